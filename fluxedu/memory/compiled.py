"""torch.compile, block by block: one graph for all double blocks, one for all single blocks."""

from __future__ import annotations

import torch

from fluxedu.errors import CompileError, describe
from fluxedu.models.flux import Flux


def compile_blocks(flux: Flux, backend: str | bool = True, dynamic: bool | None = None) -> Flux:
    """Compile every block with torch.compile, in place, at its first call; returns ``flux``.

    Only the blocks, since they take the time: a graph of one block is built in seconds, of the whole network in
    minutes. While an instrument is active, the blocks run uncompiled (``fluxedu.instruments.watching``): the
    latents of a recorded run equal those of an uncompiled network to the last bit, and those of a compiled one up to
    rounding (about 6e-5). backend: True for inductor, or a name such as ``aot_eager`` · dynamic: as in torch.compile.
    Raises CompileError at once where the compiler does not work or blocks are streamed.
    """
    backend = "inductor" if backend is True else backend
    known = ("eager", "aot_eager", *torch.compiler.list_backends())
    if not isinstance(backend, str) or backend not in known:
        raise CompileError(
            f"compile must be True or one of {', '.join(dict.fromkeys(known))}, not {describe(backend)}."
        )
    blocks = [*flux.double_blocks, *flux.single_blocks]
    if flux.placement is not None and flux.placement.streamed:
        raise CompileError('streamed blocks cannot be compiled; load with memory="full" or "no-modulations".')
    _check_compiler(backend, flux.img_in.weight.device)
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)
    return flux


def _check_compiler(backend: str, device: torch.device) -> None:
    """Compile a small function: whether a compiler works (on a CPU it needs a C++ toolchain) shows only in use."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail with errors of many classes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise CompileError(f"torch.compile does not work here ({reason}); load without compile=.") from None
