"""The arena: contestants, prompts and votes together, and the scene judge as a voter.

    a = Arena(["nano", "nano@4"], "votes.sqlite")
    ballot = a.ballot("me", "overall")           # the most informative pair, on random sides
    left, right = a.sides(ballot)                # two lists of images
    a.vote(ballot.id, "left", "me")

Anything that generates images can take part:

    contestant("nano@4")                         # what fluxedu.load opens, here with 4 steps
    contestant("sd")                             # the small Stable Diffusion
    Contestant("my model", lambda prompt, seed, height, width: ...)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fluxedu.arena.rating import Ratings, rank_pairs, rate, tally, win_matrix
from fluxedu.arena.stable_diffusion import FILE, SD, open_model
from fluxedu.arena.votes import AXES, JUDGE, Ballot, Votes, check_axis, check_voter
from fluxedu.checkpoints import find
from fluxedu.errors import ArenaError, check_integer, checked
from fluxedu.files import atomic_path, check_writable
from fluxedu.loading import SHIPPED_MODELS, WEIGHTS
from fluxedu.nano.exam import Question, questions
from fluxedu.nano.judge import Verdict, diversity, judge, quality
from fluxedu.nano.scenes import LETTERS, Claim
from fluxedu.progress import progress_bar
from fluxedu.sampling.images import to_rgb

SHAPES = ((128, 128), (96, 192), (192, 96))  # (height, width) of the images on the size axis
SEEDS = 4  # images per prompt on the diversity axis
STRIDE = 100_000  # between their seeds, so that no two ballots share an image by accident
GAP = 4  # pixels between the images of one side
DIGITS = 2  # decimal places of a score that the judge compares; equal scores are a tie


# ---------------------------------------------------------------- what a ballot shows


def axis_questions(axis: str, count: int) -> list[Question]:
    """``count`` held-out prompts for an axis; those for typography all ask for a letter."""
    if axis != "typography":
        return questions(count)
    lettered = [q for q in questions(6 * count + 20) if any(form in LETTERS for _, form, _ in q.claim.objects)]
    return lettered[:count]


def side_images(axis: str, seed: int, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """The (seed, height, width) of each image on one side.

    A side has three images of different sizes for the size axis, four with different seeds for diversity, and one
    image for every other axis.
    """
    if axis == "size":
        return [(seed, *shape) for shape in SHAPES]
    return [(seed + STRIDE * k, *size) for k in range(SEEDS if axis == "diversity" else 1)]


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """The images of one side as a single one: four in a square, any other number in a row."""
    columns = 2 if len(images) == 4 else len(images)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    width = max(sum(image.width + GAP for image in row) for row in rows) - GAP
    height = sum(max(image.height for image in row) + GAP for row in rows) - GAP
    sheet, y = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        x = 0
        for image in row:
            sheet.paste(image.convert("RGB"), (x, y))
            x += image.width + GAP
        y += max(image.height for image in row) + GAP
    return sheet


# ---------------------------------------------------------------- contestants and their images


@dataclass(frozen=True)
class Contestant:
    """A name and a function ``(prompt, seed, height, width) -> image``.

    ``version`` identifies the weights: images stored with another version are not used again.
    """

    name: str
    draw: Callable[[str, int, int, int], Image.Image]
    version: str = ""


_load = cache(open_model)  # nano and nano@4 share one model


@checked(ArenaError)
def contestant(spec: str, device: str | torch.device | None = None) -> Contestant:
    """The contestant for a model of :func:`fluxedu.load` or ``"sd"``; ``@4`` after the name means 4 steps.

    The weights must exist, but they are not loaded before the first image is needed.
    """
    model, _, steps = spec.partition("@")
    if steps and (not steps.isdecimal() or len(steps) > 4 or not 1 <= int(steps) <= 1000):
        raise ArenaError(f"the number after @ must be a number of steps from 1 to 1000, as in nano@4, not {spec!r}.")
    if model == SD:
        weights = [WEIGHTS / FILE]
    elif model in SHIPPED_MODELS:
        weights = find(WEIGHTS, SHIPPED_MODELS[model].transformer).parts.values()
    else:
        weights = find(model).parts.values()

    def draw(prompt: str, seed: int, height: int, width: int) -> Image.Image:
        return sample_image(_load(model, device), prompt, seed, height, width, int(steps) if steps else None)

    return Contestant(spec, draw, _version(weights))


def sample_image(pipe, prompt: str, seed: int, height: int, width: int, steps: int | None) -> Image.Image:
    """One image with the model's own guidance scale."""
    settings = {"seed": seed, "height": height, "width": width, "steps": steps}
    return pipe(prompt, **settings, trajectory=False, progress=False).images[0]


def _version(parts: Iterable[Path]) -> str:
    """Names, sizes and times of the weight files; a hash of their content would take minutes for 24 GB."""
    files = [path for part in parts for path in ([part] if part.is_file() else sorted(part.glob("*.safetensors")))]
    return repr([(path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


class Gallery:
    """The contestants' images, each generated once and then kept in memory and, if given, in ``folder``.

    One image is generated at a time, however many threads call.
    """

    def __init__(self, contestants: Sequence[Contestant], folder: Path | str | None = None):
        self.contestants = {c.name: c for c in contestants}
        if len(self.contestants) < max(len(contestants), 2):
            names = ", ".join(c.name for c in contestants) or "none"
            raise ArenaError(f"an arena needs at least two contestants with different names, not {names}.")
        self.folder = None if folder is None else Path(folder)
        self.images: dict[str, Image.Image] = {}
        self.lock = threading.Lock()

    def image(self, name: str, prompt: str, seed: int, height: int, width: int) -> Image.Image:
        """The image of contestant ``name``."""
        if name not in self.contestants:
            raise ArenaError(f"{name!r} is not a contestant here; there are {', '.join(self.contestants)}.")
        entry = self.contestants[name]
        key = sha256(repr((name, entry.version, prompt, seed, height, width)).encode()).hexdigest()
        with self.lock:
            if key not in self.images:
                path = None if self.folder is None else self.folder / f"{key}.png"
                if path is not None and path.is_file():
                    with Image.open(path) as stored:
                        self.images[key] = stored.convert("RGB")
                else:
                    self.images[key] = Image.fromarray(to_rgb(entry.draw(prompt, seed, height, width)))
                    if path is not None:
                        with atomic_path(path, overwrite=True) as part:
                            self.images[key].save(part, format="PNG")
            return self.images[key]


# ---------------------------------------------------------------- the arena


@checked(ArenaError)
class Arena:
    """Models, given by name (see :func:`contestant`) or as :class:`Contestant`, and the file of votes on them.

    prompts: number of held-out prompts per axis · folder: where images are stored for the next time · seed: for the
    random choice of sides and prompts
    """

    def __init__(
        self,
        models: Sequence[str | Contestant],
        votes: Path | str | Votes,
        *,
        prompts: int = 40,
        folder: Path | str | None = None,
        seed: int = 0,
    ):
        if not isinstance(votes, Votes):  # before the models are loaded, which takes minutes
            if os.path.exists(votes):
                votes = Votes(votes)
                votes.check_writable()
            elif not Path(votes).parent.is_dir():
                raise ArenaError(f"{votes} cannot be used as a file of votes: its folder does not exist.")
            else:
                check_writable(Path(votes))
        self.gallery = Gallery([contestant(m) if isinstance(m, str) else m for m in models], folder)
        self.names = tuple(self.gallery.contestants)
        self.votes = votes if isinstance(votes, Votes) else Votes(votes)
        self.prompts = check_integer("prompts", prompts, 1, 10_000, error=ArenaError)
        self.seed, self.lock = check_integer("seed", seed, 0, 2**63 - 1, error=ArenaError), threading.Lock()
        self._questions: dict[str, list[Question]] = {}

    def questions(self, axis: str) -> list[Question]:
        """The prompts of an axis."""
        if check_axis(axis) not in self._questions:
            self._questions[axis] = axis_questions(axis, self.prompts)
        return self._questions[axis]

    def ballot(self, voter: str, axis: str = "overall") -> Ballot:
        """The voter's open ballot on this axis, as after a reload of the page, or else a new one.

        Nobody sees the same two images twice; raises ArenaError if the voter has seen all pairs.
        """
        check_voter(voter)
        questions = {(q.prompt, q.seed): q for q in self.questions(axis)}
        with self.lock:
            for ballot in self.votes.open(axis, voter):
                if {ballot.left, ballot.right} <= set(self.names) and (ballot.prompt, ballot.seed) in questions:
                    return ballot
            return self._issue(voter, axis, questions)

    def _issue(self, voter: str, axis: str, questions: dict[tuple[str, int], Question]) -> Ballot:
        who = JUDGE if voter == JUDGE else "people"
        rng = np.random.default_rng([self.seed, self.votes.issued()])
        pending = [(a, b, 1, n) for a, b, n in self.votes.pending(axis, who) if {a, b} <= set(self.names)]
        tables = (tally(self.names, votes) for votes in (self.outcomes(axis, who), pending))
        wins, on_screen = (win_matrix(rows, len(self.names)) for rows in tables)
        for i, j in rank_pairs(wins, rng, on_screen):
            left, right = self.names[i], self.names[j]
            shown = self.votes.shown(axis, (left, right), who, voter)
            unseen = [key for key in questions if shown.get(key, (0, 0))[1] == 0]
            if unseen:  # a random one of the prompts that were shown least for this pair
                counts = [shown.get(key, (0, 0))[0] for key in unseen]
                key = unseen[rng.choice([n for n, count in enumerate(counts) if count == min(counts)])]
                return self.votes.issue(axis, left, right, *key, questions[key].size, voter)
        message = f"voter {voter} has judged every pair on the axis {axis}; use more prompts to get more pairs."
        raise ArenaError(message, "You have judged all pairs for this question. Choose another question above.")

    def vote(self, ballot: str, choice: str, voter: str) -> bool:
        """Store a vote: left, right or tie. False if the same vote was stored before."""
        return self.votes.vote(ballot, choice, voter)

    def sides(self, ballot: Ballot) -> tuple[list[Image.Image], list[Image.Image]]:
        """The images on the left and on the right."""
        return self.side(ballot, "left"), self.side(ballot, "right")

    def side(self, ballot: Ballot, side: str) -> list[Image.Image]:
        """The images on one side."""
        specs = side_images(ballot.axis, ballot.seed, (ballot.height, ballot.width))
        return [self.gallery.image(getattr(ballot, side), ballot.prompt, *spec) for spec in specs]

    def prepare(self, axes: Sequence[str] = tuple(AXES)) -> int:
        """Generate every image that these axes can show, so that no voter waits; returns their number."""
        needed = dict.fromkeys(
            (name, q.prompt, *spec)
            for axis in axes
            for q in self.questions(axis)
            for spec in side_images(axis, q.seed, q.size)
            for name in self.names
        )
        for image in progress_bar(needed, desc="images"):
            self.gallery.image(*image)
        return len(needed)

    def ratings(self, axis: str = "overall", who: str = "all", **options) -> Ratings:
        """Elo on an axis from the votes of ``judge``, ``people`` or ``all``; options as for :func:`rate`."""
        return rate(self.names, self.outcomes(axis, who), **options)

    def outcomes(self, axis: str, who: str = "all") -> list[tuple[str, str, float, int]]:
        """Votes on the present contestants; the file may contain others."""
        return [vote for vote in self.votes.outcomes(axis, who) if {vote[0], vote[1]} <= set(self.names)]


# ---------------------------------------------------------------- the scene judge as a voter


def prompt_following(verdict: Verdict) -> float:
    """The share of the prompt's claims that hold; 1 means that all hold and nothing else is in the image."""
    return float(np.mean([*verdict.results, not verdict.extra]))


def score(axis: str, images: Sequence, claim: Claim) -> tuple[float, ...]:
    """The score of one side on an axis, by :mod:`fluxedu.nano.judge`; of two sides, the greater tuple wins.

    Overall, prompt following decides first and quality second. Diversity is that of positions and sizes, whether or
    not the prompt is followed.
    """
    verdicts = [judge(image, claim) for image in images]
    first = verdicts[0]
    match check_axis(axis):
        case "overall":
            scores = (prompt_following(first), quality(images[0], first.detections))
        case "prompt" | "size":
            scores = (float(np.mean([prompt_following(v) for v in verdicts])),)
        case "typography":
            scores = (sum(first.letters) / len(first.letters),) if first.letters else (0.0,)
        case "diversity":
            scores = (diversity([v.detections for v in verdicts]),)
        case "quality":
            scores = (quality(images[0], first.detections),)
    return tuple(round(s, DIGITS) for s in scores)


def preference(axis: str, left: Sequence, right: Sequence, claim: Claim) -> str:
    """The judge's vote on two sides: left, right or tie."""
    a, b = score(axis, left, claim), score(axis, right, claim)
    return "tie" if a == b else "left" if a > b else "right"


def judge_votes(arena: Arena, votes: int, axes: Sequence[str] = tuple(AXES)) -> int:
    """Let the judge give up to ``votes`` votes, alternating between the axes; returns how many it gave.

    It gives fewer if it has judged every pair.
    """
    claims = {axis: {(q.prompt, q.seed): q.claim for q in arena.questions(axis)} for axis in axes}
    given, remaining = 0, list(axes)
    with progress_bar(total=votes, desc="judge") as bar:
        while remaining and given < votes:
            axis = remaining[given % len(remaining)]
            try:
                ballot = arena.ballot(JUDGE, axis)
            except ArenaError:  # every pair on this axis has been judged
                remaining.remove(axis)
                continue
            choice = preference(axis, *arena.sides(ballot), claims[axis][ballot.prompt, ballot.seed])
            given += arena.vote(ballot.id, choice, JUDGE)
            bar.update()
    return given
