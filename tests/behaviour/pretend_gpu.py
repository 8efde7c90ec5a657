"""A simulated GPU: ``cuda:0`` on a machine without one. Tests use it to check that tensors are on the right device.

    with pretend_gpu():
        x = torch.ones(3, device="cuda")   # x.device is cuda:0; it is computed on the CPU
        x + torch.ones(3)                  # RuntimeError: Expected all tensors to be on the same device ...

A tensor on it is a CPU tensor of another class, :class:`OnGpu`. Every call on such a tensor, and every call that makes
or moves a tensor, goes through :func:`_call`, which raises an error where CUDA would: for a mixture of devices, for
``.numpy()``, or for a CPU generator. Gradients, views and sharing are torch's own. Speed and CUDA's rounding are not
simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
GIB = 2**30

#: functions that create a tensor: on the CPU unless a device is given
MAKERS = (
    "zeros ones empty full arange linspace logspace eye rand randn randint randperm scalar_tensor fft_fftfreq "
    "fft_rfftfreq hann_window hamming_window blackman_window tril_indices triu_indices from_numpy empty_strided"
).split()
#: functions that do not even accept a single number from another device
TOGETHER = (
    "cat concat concatenate stack hstack vstack dstack column_stack embedding index_select gather take take_along_dim "
    "scatter scatter_ scatter_add scatter_add_ index_add index_add_ index_copy index_copy_"
).split()
CPU_ONLY = ("histogram", "histogramdd", "_scaled_dot_product_flash_attention_for_cpu")


class OnGpu(Tensor):
    """A tensor on the simulated GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func, kinds, args=(), kwargs=None):
        return _call(func, args, kwargs or {})

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream) -> None:
        pass

    def numpy(self, *, force: bool = False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def __repr__(self, **kwargs) -> str:
        return f"{self.detach().cpu()!r}"[:-1] + ", device='cuda:0')"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        memo[id(self)] = new = self.detach().clone().requires_grad_(self.requires_grad)
        new.__dict__.update(self.__dict__)
        return new


class _Mode(TorchFunctionMode):
    """Passes calls that create or move ordinary tensors to :func:`_call` as well."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _numbered(device: torch.device | None = None) -> float:
    """The memory fraction, 1; like torch, this refuses a device without an index."""
    if device is not None and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")
    return 1.0


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside this context there is a GPU. Tensors made on it stay GPU tensors afterwards."""
    defaults = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "a pretend GPU",
        "get_device_capability": lambda device=None: (8, 0),
        "mem_get_info": lambda device=None: (16 * GIB, 16 * GIB),
        "get_per_process_memory_fraction": _numbered,
        "set_per_process_memory_fraction": lambda fraction, device=None: _numbered(device),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": lambda seed: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _Stream,
        "stream": lambda stream: ExitStack(),
    }
    with ExitStack() as stack:
        for name, what in defaults.items():
            stack.enter_context(patch.object(torch.cuda, name, what))
        # from torch 2.14 on, optimizers ask here whether a CUDA graph is being captured
        stack.enter_context(patch.object(torch.accelerator, "current_stream", _Stream))
        # torch.compile needs this function of a CUDA build once a GPU is reported
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))
        stack.enter_context(_Mode())
        yield


def switch_on() -> Counter:
    """Simulate a GPU for the rest of this process. Returns a count of forwards by (class, output's device type)."""
    answers = Counter()

    def count(module: nn.Module, given, answer) -> None:
        device_types = {x.device.type for x in _leaves(answer) if isinstance(x, Tensor)}
        answers.update((type(module).__name__, device_type) for device_type in device_types)

    nn.modules.module.register_module_forward_hook(count)
    _on.enter_context(pretend_gpu())
    return answers


_on = ExitStack()  # holds the context that switch_on enters


class _Event:
    """An event of a stream that has always finished."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Stream(_Event):
    def record_event(self, event=None) -> _Event:
        return _Event()

    def wait_event(self, event) -> None:
        pass

    wait_stream = wait_event

    def is_capturing(self) -> bool:
        return False


# ---------------------------------------------------------------- one call


def _call(func: Callable, args: tuple, kwargs: dict):
    """The result of ``func(*args, **kwargs)`` on a machine with a GPU, or the error."""
    with torch._C.DisableTorchFunctionSubclass():
        name = _name(func)
        if name in _OWN:
            return _OWN[name](func, *args, **kwargs)
        leaves = list(_leaves((args, kwargs)))
        gpu = [x for x in leaves if isinstance(x, OnGpu)]
        cpu = [x for x in leaves if isinstance(x, Tensor) and x.device.type == "cpu"]
        device = kwargs.get("device")
        device = None if device is None else _checked(device)
        there = _there(name, args, gpu) if device is None else device.type == "cuda"
        if gpu and name in CPU_ONLY:
            raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend.")
        if there and any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if gpu and cpu and _mixes(name, args, cpu):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(pretend GPU, in {name})"
            )
        if device is not None and device.type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return _placed(func(*args, **kwargs), there, cpu)


def _name(func: Callable) -> str:
    """The function's name, such as ``add``; for a property ``data.get`` or ``data.set``."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return f"{func.__self__.__name__}.{name.strip('_')}"
    return name.split(".")[0]  # of torch.ops.aten.add.Tensor


def _leaves(value) -> Iterator:
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _there(name: str, args: tuple, gpu: list[Tensor]) -> bool:
    """Is the result on the GPU if no device is given?"""
    return isinstance(args[0], OnGpu) if name == "__getitem__" else bool(gpu) and name not in MAKERS


def _checked(device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _placed(result, there: bool, known: list[Tensor]):
    """The same result; its new tensors, but not the arguments among them, are marked as GPU tensors if ``there``."""
    if there:
        for x in _leaves(result):
            if isinstance(x, Tensor) and not isinstance(x, OnGpu) and not any(x is k for k in known):
                _put(x, there)
    return result


def _put(x: Tensor, there: bool) -> Tensor:
    """Mark a tensor as on the GPU or on the CPU; a parameter stays a parameter."""
    param = isinstance(x, nn.Parameter)
    if there:
        x.__class__ = OnGpu
        if param:
            x._is_param = True  # torch's own mark, for parameters of another class
    else:
        x.__class__ = nn.Parameter if param else Tensor
    return x


def _mixes(name: str, args: tuple, cpu: list[Tensor]) -> bool:
    """Would CUDA refuse this mixture of devices? It accepts single numbers, and indices, from the CPU."""
    first = args[0] if args else None
    at_home = isinstance(first, Tensor) and not isinstance(first, OnGpu)
    if name in ("copy_", "fill_", "_has_compatible_shallow_copy_type"):
        return False
    if name == "__getitem__":
        return at_home and any(isinstance(i, OnGpu) and i.dim() for i in _leaves(args[1]))
    if name in ("__setitem__", "index_put", "index_put_"):
        index, value = list(_leaves(args[1])), args[2]
        elsewhere = isinstance(value, Tensor) and isinstance(value, OnGpu) == at_home and value.dim() > 0
        fancy = name != "__setitem__" or _fancy(args[1])  # else it is a copy_ into a view
        return fancy and (elsewhere or at_home and any(isinstance(i, OnGpu) and i.dim() for i in index))
    if name in TOGETHER:
        return True
    changes = name.startswith("__i") or name.endswith("_") and not name.endswith("__")
    return changes and at_home or any(x.dim() > 0 for x in cpu)


def _fancy(index) -> bool:
    one_by_one = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, list) or isinstance(i, Tensor) and i.dim() > 0 for i in one_by_one)


# ---------------------------------------------------------------- calls with rules of their own


def _to(func, x: Tensor, *args, **kwargs) -> Tensor:
    """``x.to(...)``, whose arguments may be a device, a dtype, both, or a tensor."""
    target, given = kwargs.get("device"), []
    for a in args:
        if isinstance(a, Tensor):
            target = a.device
            given += [CPU if target.type == "cuda" else target, a.dtype]
        elif isinstance(a, (str, torch.device)):
            target = _checked(a)
            given.append(CPU if target.type == "cuda" else target)
        else:
            given.append(a)
    if "device" in kwargs and target is not None:
        kwargs = {**kwargs, "device": CPU if _checked(target).type == "cuda" else target}
    there = isinstance(x, OnGpu) if target is None else _checked(target).type == "cuda"
    new = Tensor.to(x, *given, **kwargs)
    if new is x:
        return x if there == isinstance(x, OnGpu) else _put(x.clone(), there)
    return _put(new, there) if new.device.type != "meta" else new


def _tensor(func, data, *args, **kwargs) -> Tensor:
    """``torch.tensor`` and ``torch.as_tensor``: a tensor keeps its device, numbers go to the CPU by default."""
    if isinstance(data, Tensor):
        again = kwargs.pop("requires_grad", False)
        data = data.detach().clone() if func is torch.tensor else data
        return _to(func, data, **kwargs).requires_grad_(again) if again else _to(func, data, **kwargs)
    there = kwargs.get("device") is not None and _checked(kwargs["device"]).type == "cuda"
    made = func(data, *args, **{**kwargs, "device": CPU} if there else kwargs)
    return _put(made, there) if there else made


def _set_data(func, x: Tensor, value: Tensor) -> None:
    func(x, value)
    _put(x, isinstance(value, OnGpu))


def _efficient(func, q: Tensor, k: Tensor, v: Tensor, bias, with_lse: bool, *args, **kwargs):
    """CUDA's kernel for float32, which pads the log-sum-exp to a multiple of 32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    lse = nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return _put(out, True), _put(lse, True), None, None


def _flash(func, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("Expected query to have dtype half or bfloat16")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    return _put(out, True), _put(lse, True)


_OWN = {
    "to": _to,
    "cpu": lambda func, x, **kwargs: _to(func, x, CPU),
    "cuda": lambda func, x, *args, **kwargs: _to(func, x, GPU),
    "type_as": lambda func, x, other: _to(func, x, other),
    "tensor": _tensor,
    "as_tensor": _tensor,
    "asarray": _tensor,
    "data.set": _set_data,
    "device.get": lambda func, x: GPU if isinstance(x, OnGpu) else func(x),
    "numpy": lambda func, x, **kwargs: OnGpu.numpy(x, **kwargs) if isinstance(x, OnGpu) else func(x, **kwargs),
    "pin_memory": lambda func, x, *args: x,
    "is_pinned": lambda func, x, *args: False,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_flash_attention": _flash,
}
