"""One training loop for every network of the miniature: progress, averaging, checkpoints, resume.

A stage gives a model and a function ``loss(step) -> (loss, numbers to show)``; the data of a step
depends only on (seed, step), so a run that was stopped and resumed is the run that never stopped (on the
same machine: another may round differently).
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing as mp
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fluxedu.files import atomic_path
from fluxedu.nano.training.muon import Muon

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


@cache
def bfloat16_pays() -> bool:
    """Is a matrix product faster in bfloat16 here? A processor without it emulates it, a hundred times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a, best = torch.ones(256, 256, dtype=dtype), math.inf
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < seconds(torch.float32)


def product_dtype() -> torch.dtype:
    """What matrix products are computed in while training."""
    return torch.bfloat16 if bfloat16_pays() else torch.float32


def mixed_precision() -> torch.autocast:
    """Matrix products in bfloat16 where that is faster, everything else in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_pays())


def told_by(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. The rate warms up, stays, then falls linearly over the last ``decay`` share."""

    steps: int
    lr: float
    batch: int
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    weight_decay: float = 0.01
    muon: bool = False  # orthogonalised momentum for the matrices: see muon.py
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The share of ``lr`` in force at ``step``."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), left))


def parameter_groups(model: nn.Module, muon: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split into (matrices for Muon, everything else for AdamW); embeddings and ends stay with AdamW."""
    ends = ("embed", "shared", "_in.", "final_layer", "mod", "conv", "_head")
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = muon and p.ndim == 2 and not any(e in name for e in ends)
            (matrices if inner else rest).append(p)
    return matrices, rest


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, rest = parameter_groups(model, recipe.muon)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    ]
    if matrices:
        made.append(Muon(matrices, recipe.lr, recipe.weight_decay, product_dtype()))
    return made


def fingerprint(*networks: nn.Module) -> str:
    """A short name for these weights, so that what was made with them can be told from what was not."""
    told = hashlib.sha256()
    for network in networks:
        told.update(repr(network.config).encode())
        for name, value in network.state_dict().items():
            told.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()[:16]


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, noted in a list instead of breaking a step in two; only the main thread is told of them."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(which, lambda which, frame: noted.append(which)) for which in signals]
    try:
        yield noted
    finally:
        for which, handler in zip(signals, before, strict=True):
            signal.signal(which, handler)


class Run:
    """A resumable run of one stage, its state in ``folder/name``.

    ``made_from`` names what the run depends on besides its recipe (see :func:`fingerprint`). A state that was
    made from something else, or with another recipe, is not gone on with: ValueError.
    """

    def __init__(
        self, name: str, model: nn.Module, recipe: Recipe, folder: Path, resume: bool = True, made_from: str = ""
    ):
        self.name, self.model, self.recipe = name, model, recipe
        self.made_from = f"{recipe} {made_from}".strip()
        self.folder = Path(folder) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.optimizers = optimizers(model, recipe)
        self.average = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if resume and (self.folder / "state.safetensors").exists():
            self._restore()

    # -- state on disk: tensors in one safetensors file, written aside and renamed

    def save(self) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{j}/{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        told = {"step": str(self.step), "seconds": f"{self.seconds:.1f}", "made_from": self.made_from}
        with atomic_path(self.folder / "state.safetensors", overwrite=True) as part:
            save_file(tensors, part, told)

    def _restore(self) -> None:
        path = self.folder / "state.safetensors"
        advice = "take another folder with --out, or begin this stage anew with --no-resume"
        try:
            meta, tensors = told_by(path), load_file(path)
        except SafetensorError:
            raise ValueError(f"{path} is damaged; {advice}.") from None
        if meta.get("made_from") != self.made_from:
            raise ValueError(f"{path} was made by another recipe or from other weights; {advice}.")
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        part = lambda head: {k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)}  # noqa: E731
        self.model.load_state_dict(part("model/"))
        self.average = part("average/")
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for key, value in part(f"optimizer/{i}/").items():
                j, slot = key.split("/")
                state.setdefault(int(j), {})[slot] = value
            whole = optimizer.state_dict()
            whole["state"] = state
            optimizer.load_state_dict(whole)

    # -- the loop

    def train(self, loss: Loss, report: Callable[[Run], None] | None = None, every: int = 2000) -> dict[str, Tensor]:
        """Train to the end of the recipe; returns the averaged weights. Ctrl-C stops after the step at hand, saved."""
        with interruptions() as noted:
            return self._train(loss, report, every, noted)

    def _train(
        self, loss: Loss, report: Callable[[Run], None] | None, every: int, noted: list[int]
    ) -> dict[str, Tensor]:
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.name, mininterval=5, smoothing=0.02)
        saved, started = time.monotonic(), time.monotonic() - self.seconds
        shown: dict[str, float] = {}
        self.model.train()
        while self.step < self.recipe.steps:
            numbers = self._one_step(loss)
            for key, value in numbers.items():  # smoothed, so that the bar can be read
                shown[key] = value if key not in shown else 0.98 * shown[key] + 0.02 * value
            bar.update()
            self.seconds = time.monotonic() - started
            if self.step % 50 == 0:
                bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            if noted or time.monotonic() - saved > 120 or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
            if noted:
                bar.close()
                raise KeyboardInterrupt
            if report and (self.step % every == 0 or self.step == self.recipe.steps):
                report(self)
                self.model.train()
        bar.close()
        return self.average

    def _one_step(self, loss: Loss) -> dict[str, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * self.recipe.rate(self.step)
        value, numbers = loss(self.step)
        if not math.isfinite(float(value.detach())):
            raise FloatingPointError(
                f"the loss of {self.name} is {float(value.detach())} at step {self.step}; lower the rate."
            )
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"a gradient of {self.name} is {norm} at step {self.step}; lower the rate.")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        now = self.model.state_dict()
        floats = [k for k in self.average if now[k].is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [now[k].float() for k in floats], 1 - keep)
        return {"loss": float(value.detach()), **numbers}


def use_average(model: nn.Module, average: dict[str, Tensor]) -> nn.Module:
    """Load averaged weights into ``model`` for use: evaluation mode, no gradients."""
    model.load_state_dict(average)
    return model.eval().requires_grad_(False)


class Prefetch:
    """Make the batches of coming steps in a second process while this one trains."""

    def __init__(self, make: Callable[[int, int], object], batch: int, ahead: int = 6):
        self.make, self.batch, self.ahead = make, batch, ahead
        self.pool = ProcessPoolExecutor(
            1, mp_context=mp.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        self.coming: dict[int, object] = {}

    def __call__(self, step: int):
        for s in range(step, step + self.ahead):
            if s not in self.coming:
                self.coming[s] = self.pool.submit(self.make, s, self.batch)
        return self.coming.pop(step).result()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)
