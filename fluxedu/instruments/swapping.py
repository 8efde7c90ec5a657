"""Swapping: run the trained pipeline with a module of your own in place of one of its modules.

with fe.swap("double.*.img_attn", MyAttention):
    pipe("a red circle")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxedu import probe
from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.watching import accepts
from fluxedu.models.attention import QKNorm, RMSNorm, SelfAttention
from fluxedu.models.blocks import MLP, DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.flux import LastLayer
from fluxedu.models.modulation import MLPEmbedder, Modulation


def _without_bias(linear: nn.Linear) -> tuple[bool, ...]:
    """One more argument, False, where the layers have no bias, as in FLUX.2."""
    return () if linear.bias is not None else (False,)


#: the arguments with which a class is constructed that replaces a module of this class
_ARGUMENTS: dict[type, Callable[[nn.Module], tuple]] = {
    SelfAttention: lambda m: (m.qkv.in_features, m.num_heads, m.qkv.bias is not None, *_without_bias(m.proj)),
    MLP: lambda m: (m[2].out_features, m[2].in_features),
    Modulation: lambda m: (m.lin.in_features, m.is_double),
    LastLayer: lambda m: (m.linear.in_features, m.linear.out_features, *_without_bias(m.linear)),
    MLPEmbedder: lambda m: (m.in_layer.in_features, m.in_layer.out_features, *_without_bias(m.in_layer)),
    QKNorm: lambda m: (len(m.query_norm.scale),),
    RMSNorm: lambda m: (len(m.scale),),
    DoubleStreamBlock: lambda m: (m.config,),
    SingleStreamBlock: lambda m: (m.config,),
}


_active: list[swap] = []


class swap:  # noqa: N801 - used like a function
    """Replace every module whose path matches ``glob`` by ``new``, inside a ``with`` block.

    new: a class, constructed with the same arguments as the module that it replaces, then loaded with its weights; or a
    function ``old -> module``; or a module · pipe: only in this pipeline or network, by default in all that are loaded.
    Paths are those of sites: ``double.0.img_attn``, ``single.2``, ``final_layer``.

    The network itself is changed, so unlike other instruments a swap acts in every thread that uses it.

    Raises InstrumentError for a path that does not exist, weights that do not fit by name or shape, a ``forward`` that
    takes other arguments or, at the first call, returns other shapes or another dtype.
    """

    def __init__(self, glob: str, new: type[nn.Module] | Callable[[nn.Module], nn.Module] | nn.Module, pipe=None):
        self.glob, self.new, self.pipe = glob, new, pipe
        if not (isinstance(new, nn.Module) or callable(new)):
            raise InstrumentError(f"new must be a module, a class or a function, not {describe(new)}.")
        if not isinstance(new, (nn.Module, type)) and not accepts(new, None):
            raise InstrumentError(
                f"new must take the old module, as in lambda old: ..., which {describe(new)} does not."
            )
        if not isinstance(glob, str):
            raise InstrumentError(f"glob must be a path such as 'double.*.img_attn', not {describe(glob)}.")
        if not (pipe is None or isinstance(pipe, nn.Module) or callable(getattr(pipe, "networks", None))):
            raise InstrumentError(f"pipe must be a pipeline or a network, not {describe(pipe)}.")
        self.swapped: list[list] = []  # (parent, name, old, new)
        self.checks: list = []  # hooks that check the first output
        self.before: list[tuple] = []  # (module, its training mode, its site path) of every new module

    def __enter__(self) -> swap:
        found = [match for network in self._networks() for match in _matching_modules(network, self.glob)]
        if not found:
            raise InstrumentError(f"no module of a loaded model is called {self.glob!r}; try 'double.*.img_attn'.")
        try:
            with torch.random.fork_rng(devices=[]):  # constructing a class draws random weights
                new = [(parent, name, old, self._build(old, path)) for parent, name, old, path in found]  # all or none
        except BaseException:
            self._restore()
            raise
        for parent, name, old, module in new:
            self.swapped.append([parent, name, old, module])
            parent._modules[name] = module
        _active.append(self)
        return self

    def __exit__(self, *_) -> None:
        _active.remove(self)
        while self.swapped:
            parent, name, old, new = self.swapped.pop()
            if parent._modules[name] is new:
                parent._modules[name] = old
            for later in (entry for other in _active for entry in other.swapped):
                if (
                    later[2] is new
                ):  # a later swap replaced this module and is still active: it shall restore the old one
                    later[2] = old
        self._restore()

    def _restore(self) -> None:
        """Return the new modules to their own training mode and site paths, and remove the hooks."""
        for check in self.checks:
            check.remove()
        for module, training, path in reversed(self.before):
            module.training = training
            if path is not None:
                module.site_path = path
        self.checks, self.before = [], []

    def _networks(self) -> list[nn.Module]:
        if self.pipe is None:
            return list(probe.networks)
        return [self.pipe] if isinstance(self.pipe, nn.Module) else list(self.pipe.networks().values())

    def _build(self, old: nn.Module, path: str) -> nn.Module:
        module = self.new if isinstance(self.new, nn.Module) else self._construct(old, path)
        if not isinstance(module, nn.Module):
            raise InstrumentError(f"the new module at {path!r} must be a torch.nn.Module, not {describe(module)}.")
        self.before += [(part, part.training, getattr(part, "site_path", None)) for part in module.modules()]
        if module is not self.new:
            _copy_weights(module, old, path)
        _check_arguments(module, old, path)
        first = next(old.parameters(), None)
        module = (
            module.train(old.training) if first is None else module.to(first.device, first.dtype).train(old.training)
        )
        if isinstance(module, probe.Probed):
            probe.name_submodules(module, getattr(old, "site_path", path))
        self.checks.append(_check_first_output(module, old, path))
        return module

    def _construct(self, old: nn.Module, path: str) -> nn.Module:
        if not isinstance(self.new, type):
            return self.new(old)
        arguments = next((of for kind, of in _ARGUMENTS.items() if isinstance(old, kind)), None)
        if arguments is None:
            raise InstrumentError(
                f"the arguments of a class at {path!r} are not known; "
                f"pass a function of the old module: lambda old: {self.new.__name__}(...)."
            )
        try:
            return self.new(*arguments(old))
        except TypeError as error:
            given = ", ".join(str(x) if isinstance(x, int) else f"a {type(x).__name__}" for x in arguments(old))
            raise InstrumentError(
                f"{self.new.__name__} must be constructible with ({given}) at {path!r}: {error}."
            ) from None


def _matching_modules(network: nn.Module, glob: str) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """(parent, attribute name, module, path) of every module whose path matches."""
    prefix = getattr(network, "site_path", "")
    found = []
    for path, module in network.named_modules():
        full_path = ".".join(part for part in (prefix, probe.short_path(path)) if part)
        if path and probe.matches(full_path, glob):
            parent, _, name = path.rpartition(".")
            found.append((network.get_submodule(parent), name, module, full_path))
    return [f for f in found if not any(g[2] is not f[2] and f[0] in g[2].modules() for g in found)]  # the outermost


def _copy_weights(module: nn.Module, old: nn.Module, path: str) -> None:
    mine, theirs = module.state_dict(), old.state_dict()
    for name in theirs:
        if name not in mine:
            raise InstrumentError(f"{type(module).__name__} has no tensor {name!r}, which the module at {path!r} has.")
        if mine[name].shape != theirs[name].shape:
            raise InstrumentError(
                f"{type(module).__name__}'s {name!r} is {list(mine[name].shape)}; "
                f"at {path!r} it is {list(theirs[name].shape)}."
            )
    extra = sorted(set(mine) - set(theirs))
    if extra:
        raise InstrumentError(
            f"{type(module).__name__} has a tensor {extra[0]!r}, which the module at {path!r} does not have."
        )
    module.load_state_dict(theirs)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)


def _check_arguments(module: nn.Module, old: nn.Module, path: str) -> None:
    takes = list(inspect.signature(old.forward).parameters)
    try:
        inspect.signature(module.forward).bind(*takes)
    except TypeError:
        mine = ", ".join(inspect.signature(module.forward).parameters)
        raise InstrumentError(
            f"{type(module).__name__}.forward takes ({mine}); at {path!r} it is called with ({', '.join(takes)})."
        ) from None


def _check_first_output(module: nn.Module, old: nn.Module, path: str):
    """At the first call, compare the shapes and dtypes of the output with the old module's."""

    def check(_, given, out):
        handle.remove()
        watcher = probe.watch(None)  # the old module runs only for its shapes: no instrument shall see it
        try:
            with torch.no_grad():
                theirs = old(*given)
        except Exception as error:
            raise InstrumentError(
                f"the inputs of {type(module).__name__} at {path!r} do not fit the module there ({describe(error)}); "
                f"a module used in several places must fit all of them."
            ) from None
        finally:
            probe.watch(watcher)
        for of in (_shapes, _dtypes):
            mine, expected = of(out), of(theirs)
            if mine != expected:
                raise InstrumentError(f"{type(module).__name__} returns {mine} at {path!r}; it must return {expected}.")

    handle = module.register_forward_hook(check)
    return handle


def _shapes(out) -> list | str:
    return _each(out, lambda tensor: list(tensor.shape))


def _dtypes(out) -> list | str:
    return _each(out, lambda tensor: str(tensor.dtype).removeprefix("torch."))


def _each(out, of: Callable[[Tensor], list | str]) -> list | str:
    if isinstance(out, Tensor):
        return of(out)
    return [_each(o, of) for o in out] if isinstance(out, (tuple, list)) else type(out).__name__
