"""One training loop for every network: optimisers, weight averaging, checkpoints, resuming.

A script provides a model and a function ``loss(step) -> (loss, values for the progress bar)``. The data of a step
depends only on (seed, step), so a run that was stopped and resumed gives exactly the weights of a run that never
stopped (on the same machine; another one may round differently).
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from fluxedu.errors import CheckpointError, check_integer, check_number
from fluxedu.files import atomic_path, check_writable
from fluxedu.threads import adapted_threads, step_done
from training.files import read_file

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]


# ---------------------------------------------------------------- precision


@cache
def bfloat16_is_faster() -> bool:
    """Whether matrix products are faster in bfloat16 here. A CPU that must emulate it is a hundred times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a, best = torch.ones(256, 256, dtype=dtype), math.inf
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < seconds(torch.float32)


def matmul_dtype() -> torch.dtype:
    """The dtype of matrix products during training."""
    return torch.bfloat16 if bfloat16_is_faster() else torch.float32


class PlainAttention(TorchFunctionMode):
    """Inside a ``with``, short attention on a CPU is three plain steps: in bfloat16, backward included, a fifth of the
    time of the fused kernel.
    """

    MAX_TOKENS = 256

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_plain = func is F.scaled_dot_product_attention and not kwargs
        if is_plain and args[0].device.type == "cpu" and args[0].shape[2] <= self.MAX_TOKENS:
            q, k, v = args
            return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return func(*args, **kwargs)


def mixed_precision() -> torch.autocast:
    """Matrix products in bfloat16 where that is faster, everything else in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_faster())


# ---------------------------------------------------------------- optimisers

MOMENTUM = 0.95
#: odd polynomial that drives all singular values towards 1; steep at 0, so five iterations are enough
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``, by Newton-Schulz iteration; singular values become 0.5 to 1.5."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):  # x <- A x + B (x x^T) x + C (x x^T)^2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so that no direction of a matrix is learned faster than another.

        m <- mu m + (1 - mu) g;    u = mu m + (1 - mu) g;    W <- W - lr * 0.2 sqrt(max(rows, columns)) * UV^T of u

    For matrices only; ``lr`` and ``weight_decay`` mean what they mean for AdamW. ``torch.optim.Muon`` always computes
    in bfloat16, which a CPU without it emulates slowly. This one takes the dtype and is otherwise the same.
    Source: Jordan et al. 2024; the factor that matches AdamW's step size is from arXiv 2502.16982.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                momentum = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                momentum.lerp_(w.grad, 1 - MOMENTUM)
                update = orthogonalise(w.grad.lerp(momentum, MOMENTUM), self.dtype)
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(update, alpha=-group["lr"] * 0.2 * max(w.shape) ** 0.5)


@dataclass(frozen=True)
class Recipe:
    """Length and learning rate of a run.

    The rate warms up over ``warmup`` steps, stays constant, then falls linearly to 0 over the last ``decay`` share.
    """

    steps: int
    lr: float
    batch: int
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    weight_decay: float = 0.01
    muon: bool = False  # Muon for the matrices inside blocks, AdamW for everything else
    clip: float = 1.0  # largest norm of the gradient

    def rate(self, step: int) -> float:
        """The factor on ``lr`` at ``step``, from 0 to 1."""
        remaining = (self.steps - step) / max(1, self.decay * self.steps)
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), remaining))


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and with ``recipe.muon`` also Muon, for all matrices but embeddings, modulation, first and last layers."""
    not_for_muon = ("embed", "shared", "_in.", "final_layer", "mod", "conv", "_head")
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            use_muon = recipe.muon and p.ndim == 2 and not any(part in name for part in not_for_muon)
            (matrices if use_muon else rest).append(p)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    ]
    if matrices:
        found.append(Muon(matrices, recipe.lr, recipe.weight_decay, matmul_dtype()))
    return found


# ---------------------------------------------------------------- a run


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of breaking off a step. Outside the main thread, none arrive."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, frame: received.append(number)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


class Run:
    """A resumable training run with its state in ``folder/name/state.safetensors``.

    ``made_from`` names what the run depends on besides its recipe (see :func:`fingerprint`). A state that was made from
    something else, or with another recipe, is not resumed: ValueError.
    """

    def __init__(
        self, name: str, model: nn.Module, recipe: Recipe, folder: Path, resume: bool = True, made_from: str = ""
    ):
        self.name, self.model, self.recipe = name, model, recipe
        self.made_from = f"{recipe} {made_from}".strip()
        self.folder = Path(folder) / name
        self.path = self.folder / "state.safetensors"
        check_writable(self.path)  # now, and not after two minutes of training
        self.optimizers = optimizers(model, recipe)
        self.average = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if resume and self.path.exists():
            self._restore()

    def save(self) -> None:
        """Write weights, average and optimiser state into one file; raises CheckpointError if the disk is full."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{j}/{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.1f}", "made_from": self.made_from}
        try:
            with atomic_path(self.path, overwrite=True) as part:
                save_file(tensors, part, metadata)
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} cannot be written at step {self.step}: {reason}; the same command continues from the "
                f"state that was written last."
            ) from None

    def _restore(self) -> None:
        advice = "choose another folder with --out, or start this stage again with --no-resume"
        try:
            metadata, tensors = read_file(self.path)
            if metadata.get("made_from") != self.made_from:
                raise CheckpointError(f"{self.path} was made by another recipe or from other weights; {advice}.")
            self._set_state(metadata, tensors)
        except (CheckpointError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if "made by" in str(error):
                raise
            raise CheckpointError(f"{self.path} is damaged; {advice}.") from None

    def _set_state(self, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        """Take over a state; raises one of several errors if it is not one of this model and its optimisers."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        def check(values: dict[str, Tensor], like: dict[str, Tensor]) -> None:
            if {k: (v.shape, v.dtype) for k, v in values.items()} != {k: (v.shape, v.dtype) for k, v in like.items()}:
                raise ValueError

        self.step = check_integer("step", int(metadata["step"]), 0, self.recipe.steps)
        self.seconds = check_number("seconds", float(metadata["seconds"]), 0, 1e12)
        model, average = below("model/"), below("average/")
        check(model, self.model.state_dict())
        check(average, self.average)
        self.model.load_state_dict(model)
        self.average = average
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for key, value in below(f"optimizer/{i}/").items():
                j, slot = key.split("/")
                state.setdefault(int(j), {})[slot] = value
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for j, slots in state.items():
                muon = isinstance(optimizer, Muon)
                names = ["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq"]
                scalar = {} if muon else {"step": torch.tensor(0.0)}
                check(slots, {**dict.fromkeys(names, weights[j]), **scalar})
            if self.step and not state:
                raise ValueError
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def train(self, loss: Loss, report: Callable[[Run], None] | None = None, every: int = 2000) -> dict[str, Tensor]:
        """Train to the end of the recipe; returns the averaged weights.

        ``report(run)`` is called after every ``every`` steps and at the end. Ctrl-C finishes the current step, saves
        the state and raises KeyboardInterrupt.
        """
        progress = tqdm(total=self.recipe.steps, initial=self.step, desc=self.name, mininterval=5, smoothing=0.02)
        saved, started = time.monotonic(), time.monotonic() - self.seconds
        smoothed: dict[str, float] = {}
        self.model.train()
        with deferred_signals() as received, adapted_threads(self.model, "training"):
            while self.step < self.recipe.steps:
                values = self._one_step(loss)
                step_done()
                for key, value in values.items():  # smoothed, so that the progress bar can be read
                    smoothed[key] = value if key not in smoothed else 0.98 * smoothed[key] + 0.02 * value
                progress.update()
                self.seconds = time.monotonic() - started
                if self.step % 50 == 0:
                    progress.set_postfix({k: f"{v:.4g}" for k, v in smoothed.items()}, refresh=False)
                if received or time.monotonic() - saved > 120 or self.step == self.recipe.steps:
                    self.save()
                    saved = time.monotonic()
                if received:
                    progress.close()
                    raise KeyboardInterrupt
                if report and (self.step % every == 0 or self.step == self.recipe.steps):
                    report(self)
                    self.model.train()
        progress.close()
        return self.average

    def _one_step(self, loss: Loss) -> dict[str, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * self.recipe.rate(self.step)
        with PlainAttention():
            value, values = loss(self.step)
        if not math.isfinite(float(value.detach())):
            raise FloatingPointError(
                f"the loss of {self.name} is {float(value.detach())} at step {self.step}; use a lower learning rate."
            )
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of {self.name} is {norm} at step {self.step}; use a lower learning rate."
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        current = self.model.state_dict()
        floats = [k for k in self.average if current[k].is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [current[k].float() for k in floats], 1 - decay)
        return {"loss": float(value.detach()), **values}


def load_average(model: nn.Module, average: dict[str, Tensor]) -> nn.Module:
    """Load averaged weights into ``model``; returns it in evaluation mode and without gradients."""
    model.load_state_dict(average)
    return model.eval().requires_grad_(False)


def _begin_worker() -> None:
    """Use one thread, and end together with the process that trains, however it ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the other one ends this

    def watch() -> None:
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Prefetch:
    """Make the batches of the next steps in a second process while this one trains.

    >>> with Prefetch(make, batch=64) as batches:  # doctest: +SKIP
    ...     batches(step)  # make(step, 64)
    """

    def __init__(self, make: Callable[[int, int], object], batch: int, ahead: int = 6):
        self.make, self.batch, self.ahead = make, batch, ahead
        self.pool = ProcessPoolExecutor(1, mp_context=mp.get_context("spawn"), initializer=_begin_worker)
        self.pending: dict[int, object] = {}

    def __call__(self, step: int):
        for s in range(step, step + self.ahead):
            if s not in self.pending:
                self.pending[s] = self.pool.submit(self.make, s, self.batch)
        return self.pending.pop(step).result()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)
