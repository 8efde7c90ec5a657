"""Warnings about what would go wrong silently: NaN and infinity in a run, and forward hooks that are never called."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxedu.errors import RequestError
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.flux import Flux
from fluxedu.probe import Sited, Watcher, current_watcher, site, watch
from fluxedu.sampling.step_context import current_context, entered

if TYPE_CHECKING:
    from fluxedu.sampling.pipeline import FluxPipeline
    from fluxedu.sampling.prompts import PromptEncoder

_thread = threading.local()

ATTRIBUTES = {"clip": "prompt_encoder.clip", "t5": "prompt_encoder.t5", "ae": "autoencoder"}  # of the pipeline
ATTRIBUTES |= {"language_model": "prompt_encoder.language_model"}


def warn(message: str) -> None:
    """Warn where fluxedu was called from."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fluxedu."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


# ---------------------------------------------------------------- networks that the pipeline cannot call as they are


def check_widths(prompt_encoder: PromptEncoder, flux: Flux, autoencoder: AutoEncoder) -> None:
    """Raises RequestError unless the transformer reads what the text encoders and the autoencoder compute."""
    if not isinstance(flux, Flux) or not isinstance(autoencoder, AutoEncoder):
        found = f"{type(flux).__name__} and {type(autoencoder).__name__}"
        raise RequestError(f"a pipeline needs a Flux and an AutoEncoder, in this order, not {found}.")
    txt_width, pooled_width = prompt_encoder.widths
    is_flux1 = flux.config.vec_in_dim > 0
    fits = {"CLIP's width" if is_flux1 else "the pooled vector's width": (pooled_width, flux.config.vec_in_dim)}
    fits |= {"T5's width" if is_flux1 else "the language model's width": (txt_width, flux.config.context_in_dim)}
    fits |= {"the autoencoder's channels times 4": (4 * autoencoder.config.z_channels, flux.config.out_channels)}
    for what, (found, needed) in fits.items():
        if found != needed:
            raise RequestError(f"the networks are parts of different models: {what} is {found}, not {needed}.")


def check_networks(pipe: FluxPipeline) -> None:
    """Raises RequestError for a compiled transformer or autoencoder; warns about hooks that are not called."""
    if not isinstance(pipe.flux, Flux):
        raise RequestError("pipe.flux must be a Flux; to compile it, load the pipeline with compile=True.")
    if hasattr(pipe.autoencoder, "_orig_mod"):  # its encode() and decode() would run uncompiled
        raise RequestError("pipe.autoencoder cannot be compiled as a whole; compile pipe.autoencoder.decoder instead.")
    for name, network in pipe.networks().items():
        for module in network.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                _check_hooks(f"pipe.{ATTRIBUTES.get(name, name)}", network, module)


def _check_hooks(label: str, network: nn.Module, module: nn.Module) -> None:
    path = next(path for path, found in network.named_modules() if found is module)
    parents = [network.get_submodule(".".join(path.split(".")[:depth])) for depth in range(path.count(".") + 1)]
    is_streamed = getattr(network, "placement", None) is not None  # its weights are moved by hooks of ours
    label = f"{label}.{path}".rstrip(".")
    if isinstance(module, AutoEncoder):
        warn(f"forward hooks on {label} are not called, its encode() and decode() are; hook its encoder or decoder.")
    elif type(module).forward is nn.Module.forward:
        warn(f"forward hooks on {label} are never called, since it has no forward(); hook a module inside it.")
    elif not is_streamed and any(parent._compiled_call_impl is not None for parent in parents):
        warn(f"forward hooks on {label} may not be called, since its block is compiled; use fe.record or fe.intervene.")


# ---------------------------------------------------------------- NaN and infinity


class FirstNotFinite:
    """A watcher that notes the first site whose value is not finite. Interventions act; recorders receive nothing."""

    def __init__(self, watcher: Watcher | None):
        self.watcher, self.thread = watcher, threading.get_ident()
        self.first: str | None = None

    def interventions(self) -> Watcher | None:
        return self.watcher and self.watcher.interventions()

    def wants(self, owner: Sited, name: str) -> bool:
        """As in the run without recorders, so that no value is computed which that run did not need."""
        watcher = self.interventions() if threading.get_ident() == self.thread else self.watcher
        return watcher is not None and (not hasattr(watcher, "wants") or watcher.wants(owner, name))

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        if threading.get_ident() != self.thread:
            return value if self.watcher is None else self.watcher(owner, name, value)
        interventions = self.interventions()
        value = value if interventions is None else interventions(owner, name, value)
        if self.first is None and isinstance(value, Tensor) and not torch.isfinite(value).all():
            self.first = site(owner, name)
        return value

    __call__._torchdynamo_disable = True  # as torch.compiler.disable: do not compile it, call it


def check_finite(
    what: str, value: Tensor, compute: Callable[[], Any], inputs: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Warn, once per run, if ``value`` is not finite.

    ``compute()`` computes it again from ``inputs``, the values of earlier sites, to find the first site that is not.
    """
    if torch.isfinite(value).all():
        return
    context = current_context()
    run = None if context is None else context.run
    if run is not None and run == getattr(_thread, "warned_run", None):
        return
    _thread.warned_run = run
    first = next((name for name, x in inputs.items() if not torch.isfinite(x).all()), None) or first_site(compute)
    step = "" if context is None or context.step is None else f" after step {context.step}"
    where = "" if first is None else f": {first} is the first site with NaN or infinity"
    advice = ""
    if value.dtype == torch.float16:
        advice = "; float16 has no numbers above 65504, so load the pipeline with dtype='bfloat16'"
    warn(f"{what} are not finite{step}{where}{advice}.")


def first_site(compute: Callable[[], Any]) -> str | None:
    """The first site that is not finite while ``compute()`` runs."""
    context, before = current_context(), current_watcher()
    finder = FirstNotFinite(before)
    # compiled code reads no watcher
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    watch(finder)
    try:
        # an intervention may not expect to be called again
        with eager, entered(context and replace(context, stage=-1)), suppress(Exception):
            compute()
    finally:
        watch(before)
    return finder.first
