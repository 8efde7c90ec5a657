"""The exercises, one file per notebook; `fluxedu.course.exercise` explains what an exercise consists of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def random_weights(module: nn.Module, seed: int, mean: float = 0.0, std: float = 0.7) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of a module's weights."""
    g = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(x.shape, generator=g) + mean for name, x in module.state_dict().items()}


def randomise(module: nn.Module, g: torch.Generator) -> nn.Module:
    """The module with random weights, norm scales included, so that no weight is exactly 0 or 1."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = 1 + 0.3 * noise if name.endswith("scale") else noise * p.shape[-1] ** -0.5
    return module.eval().requires_grad_(False)


def build_module(answer: type[nn.Module], arguments: tuple, weights: dict[str, Tensor]) -> nn.Module:
    """A student's module with the given weights. Raises an error in one sentence if the names of its tensors differ."""
    module = answer(*arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{type(module).__name__} is not a torch.nn.Module")
    if module.state_dict().keys() != weights.keys():
        actual, expected = (", ".join(sorted(names)) or "none" for names in (module.state_dict(), weights))
        raise ValueError(f"its tensors are named {actual}; the names should be {expected}")
    module.load_state_dict(weights)
    return module


def run_module(answer: type[nn.Module], arguments: tuple, weights: dict[str, Tensor], *inputs: Tensor):
    """The output of a student's module with the given weights: the ``call`` of exercises whose answer is a module."""
    return build_module(answer, arguments, weights)(*inputs)


def subclass(solution: type[nn.Module], **methods: Callable) -> type[nn.Module]:
    """The solution with some methods replaced: a wrong answer to an exercise whose answer is a module."""
    return type(solution.__name__, (solution,), methods)
