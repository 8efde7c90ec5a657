"""Who draws: a name and a function ``(prompt, seed, height, width) -> picture``.

    contestant("nano@4")                               # what fluxedu.load opens, here in 4 steps
    contestant("sd")                                   # the small Stable Diffusion, fluxedu/nano/rivals.py
    Contestant("my model", lambda prompt, seed, height, width: ...)

Whatever draws can take part. Pictures are kept, in memory or in a folder, so that none is drawn twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image

from fluxedu.checkpoints import find
from fluxedu.errors import ArenaError
from fluxedu.files import atomic_path
from fluxedu.loading import OURS, WEIGHTS
from fluxedu.nano.rivals import FILE, SD, opened
from fluxedu.sampling.pipeline import FluxPipeline

Draw = Callable[[str, int, int, int], Image.Image]  # prompt, seed, height, width


@dataclass(frozen=True)
class Contestant:
    """``stamp`` says which weights these are: kept pictures of other weights under the same name are not used."""

    name: str
    draw: Draw
    stamp: str = ""


_opened = cache(opened)  # nano and nano@4 are one model


def contestant(spec: str, device: str | torch.device | None = None) -> Contestant:
    """What :func:`fluxedu.load` opens, or "sd"; ``@4`` after it asks for 4 steps instead of the model's own number.

    The weights are looked for now, and opened when the first picture is asked for.
    """
    model, _, steps = spec.partition("@")
    if steps and (not steps.isdecimal() or not 1 <= int(steps) <= 1000):
        raise ArenaError(f"after the @ comes a number of steps from 1 to 1000, as in nano@4, not {spec!r}.")
    if model == SD:
        parts = [WEIGHTS / FILE]
    else:
        parts = (find(WEIGHTS, OURS[model].transformer) if model in OURS else find(model)).parts.values()

    def draw(prompt: str, seed: int, height: int, width: int) -> Image.Image:
        return pictured(_opened(model, device), prompt, seed, height, width, int(steps) if steps else None)

    return Contestant(spec, draw, _stamp(parts))


def pictured(pipe: FluxPipeline, prompt: str, seed: int, height: int, width: int, steps: int | None) -> Image.Image:
    """One picture, with the model's own guidance."""
    asked = {"seed": seed, "height": height, "width": width, "steps": steps}
    return pipe(prompt, **asked, trajectory=False, progress=False).images[0]


def _stamp(parts: Iterable[Path]) -> str:
    """Changes when a file of weights does: names, sizes and times, since reading 24 GB takes minutes."""
    files = [path for part in parts for path in ([part] if part.is_file() else sorted(part.glob("*.safetensors")))]
    return repr([(path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


class Gallery:
    """The contestants' pictures, drawn when first asked for and kept: in memory, and in ``folder`` for the next time.

    One picture is drawn at a time, however many threads ask.
    """

    def __init__(self, contestants: Sequence[Contestant], folder: Path | str | None = None):
        self.contestants = {c.name: c for c in contestants}
        if len(self.contestants) < max(len(contestants), 2):
            said = ", ".join(c.name for c in contestants) or "none"
            raise ArenaError(f"an arena needs two contestants or more with different names, not {said}.")
        self.folder, self.kept, self.lock = None if folder is None else Path(folder), {}, threading.Lock()

    def picture(self, name: str, prompt: str, seed: int, height: int, width: int) -> Image.Image:
        """The picture of contestant ``name``."""
        if name not in self.contestants:
            raise ArenaError(f"{name!r} takes no part here; {', '.join(self.contestants)} do.")
        asked = (prompt, seed, height, width)
        key = sha256(repr((name, self.contestants[name].stamp, *asked)).encode()).hexdigest()
        with self.lock:
            if key not in self.kept:
                self.kept[key] = self._found(key) or self._drawn(key, name, asked)
            return self.kept[key]

    def _found(self, key: str) -> Image.Image | None:
        path = self.folder and self.folder / f"{key}.png"
        if path is None or not path.is_file():
            return None
        with Image.open(path) as image:
            return image.convert("RGB")

    def _drawn(self, key: str, name: str, asked: tuple[str, int, int, int]) -> Image.Image:
        image = self.contestants[name].draw(*asked).convert("RGB")
        if self.folder is not None:
            with atomic_path(self.folder / f"{key}.png", overwrite=True) as part:
                image.save(part, format="PNG")
        return image
