"""Gradients through a run. The pipeline builds no autograd graph, unless it is called in ``with fe.gradients():``.

latents = torch.randn(1, 16, 16, 16, requires_grad=True)
with fe.gradients(steps=[0]):      # only the first of the 4 steps
    x0 = pipe("a red circle", latents=latents, steps=4).trajectory.x0[0]
x0.square().mean().backward()      # latents.grad
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fluxedu.errors import InstrumentError, checked
from fluxedu.probe import current_watcher, is_watching, watch
from fluxedu.sampling.step_context import Steps, checked_steps, current_context, entered, is_selected

_thread = threading.local()


@dataclass(frozen=True)
class GradientMode:
    """The arguments of :func:`gradients`."""

    steps: Steps
    checkpointing: bool


@checked(InstrumentError)
@contextmanager
def gradients(steps: Steps = None, checkpointing: bool = False) -> Iterator[None]:
    """Inside the ``with``, pipelines build an autograd graph: a loss on the latents or the trajectory that they return,
    or on values that a recorder with ``detach=False`` keeps, can be differentiated.

    steps: the steps whose velocity is part of the graph, by default all; in the others, the velocity counts as a
    constant · checkpointing: keep only the inputs of each evaluation of the transformer, and compute the rest again in
    the backward pass: about a third more time, much less memory (arXiv 1604.06174).

    The graph begins at the noise, at the encoded prompts (``sample.txt``, ``sample.pooled``), and at every tensor with
    ``requires_grad`` that an intervention inserts. The weights are constants.
    """
    before = gradient_mode()
    _thread.mode = GradientMode(checked_steps(steps), checkpointing)
    try:
        yield
    finally:
        _thread.mode = before


def gradient_mode() -> GradientMode | None:
    """This thread's gradient mode; None outside of :func:`gradients`."""
    return getattr(_thread, "mode", None)


def leaf(x: Tensor) -> Tensor:
    """In gradient mode, a tensor at which the graph begins; otherwise ``x`` itself."""
    return x if gradient_mode() is None or x.requires_grad else x.detach().requires_grad_()


@contextmanager
def evaluation_grad_mode() -> Iterator[None]:
    """For one model evaluation: autograd is on if this step is selected by :func:`gradients`, otherwise off."""
    mode, context = gradient_mode(), current_context()
    if mode is not None:
        in_step = context is not None and context.step is not None
        grad_mode = torch.set_grad_enabled(not in_step or is_selected(mode.steps, context.step, context.steps))
    elif torch.is_grad_enabled():  # called outside of a pipeline
        grad_mode = nullcontext()
    else:  # inference mode has less overhead, but its values could never be part of a graph
        grad_mode = torch.no_grad() if is_watching() else torch.inference_mode()
    with grad_mode:
        yield


def checkpointed(function: Callable) -> Callable:
    """With ``gradients(checkpointing=True)``, a function whose activations the backward pass computes again."""
    mode = gradient_mode()
    if mode is None or not mode.checkpointing or not torch.is_grad_enabled():
        return function
    context, watcher = current_context(), current_watcher()

    @contextmanager
    def recomputing() -> Iterator[None]:
        """Restores the forward pass's step context and interventions; recorders are off."""
        before = watch(None if watcher is None else watcher.interventions())
        try:
            with entered(context):
                yield
        finally:
            watch(before)

    return partial(checkpoint, function, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))
