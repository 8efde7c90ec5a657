"""PyTorch's own forward hooks and torch.compile on the pipeline's networks: they work, or a sentence says why not."""

import warnings

import pytest
import torch
from runs import PROMPT, draw, latents, off

import fluxedu as fe
from fluxedu.errors import RequestError
from fluxedu.memory.compiled import compile_blocks


@pytest.fixture
def pipe(make_pipe, nothing_stays):
    return make_pipe()


def modules(pipe):
    """Every module of the networks, with the path from the pipeline."""
    prefixes = {"clip": "prompt_encoder.clip", "t5": "prompt_encoder.t5", "ae": "autoencoder", "flux": "flux"}
    for name, network in pipe.networks().items():
        for path, module in network.named_modules():
            yield ".".join(part for part in ("pipe", prefixes[name], path) if part), module


def test_a_hook_on_any_module_is_called_or_a_warning_says_that_it_is_not(pipe):
    """Image-to-image, so that the autoencoder's encoder runs as well."""
    called, paths = set(), dict(modules(pipe))
    for path, module in paths.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipe, image=torch.zeros(3, 32, 32), steps=2)
    warned = {str(warning.message).split()[3] for warning in caught}
    assert called.isdisjoint(warned) and called | warned == set(paths)
    assert {"pipe.flux", "pipe.flux.double_blocks.0", "pipe.flux.double_blocks.1.img_attn.qkv"} <= called
    assert {"pipe.prompt_encoder.t5", "pipe.prompt_encoder.clip", "pipe.autoencoder.decoder"} <= called
    assert "pipe.autoencoder" in warned


def test_a_hook_on_the_transformer_receives_its_official_arguments(pipe):
    """The same call again, by hand, gives the same velocity."""
    seen = []
    handle = pipe.flux.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    with fe.record("velocity") as rec:
        draw(pipe, steps=3)
    handle.remove()
    assert len(seen) == 3
    for (args, out), recorded in zip(seen, rec["velocity"].tensor, strict=True):
        assert torch.equal(out[0], recorded)
        with torch.no_grad():
            assert off(pipe.flux(*args), out) <= 1e-5 * float(out.abs().max())


def test_a_hook_that_returns_a_value_replaces_the_velocity(pipe):
    expected = torch.zeros(1, 4, 64)
    pipe.flux.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    run = draw(pipe, height=32, width=32).trajectory
    assert torch.equal(run.latents[-1], run.latents[0]) and off(run.velocities[0].flatten(), expected.flatten()) == 0


def test_pre_hooks_and_with_cfg_and_gradient_checkpointing(pipe):
    batches = []
    pipe.flux.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    with fe.gradients(checkpointing=True):
        out = draw(pipe, true_cfg_scale=2.0, steps=2, decode=False)
        out.latents.sum().backward()
    assert batches[:2] == [2, 2]


@pytest.mark.parametrize("inside", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"])
def test_hooks_inside_compiled_blocks(pipe, inside):
    """Compiled code does not look for hooks that were registered after its first call."""
    compile_blocks(pipe.flux, "eager")
    draw(pipe)
    module = pipe.flux.get_submodule(inside)
    module.register_forward_hook(lambda *_: None)
    with pytest.warns(
        RuntimeWarning, match=f"hooks on pipe.flux.{inside} may not be called, since its block is compiled"
    ):
        draw(pipe)


def test_compiled_networks(pipe):
    """The text encoders may be compiled; the transformer and the autoencoder are compiled in another way."""
    expected = latents(pipe)
    for name in ("t5", "clip"):
        setattr(pipe.prompt_encoder, name, torch.compile(getattr(pipe.prompt_encoder, name), backend="eager"))
    assert off(latents(pipe), expected) <= 1e-5
    with fe.record("t5.states") as rec:
        draw(pipe, PROMPT)
    assert rec["t5.states"].tensor.shape[-1] == 24
    autoencoder, flux = pipe.autoencoder, pipe.flux
    pipe.autoencoder = torch.compile(autoencoder)
    with pytest.raises(
        RequestError, match="pipe.autoencoder cannot be compiled as a whole; compile pipe.autoencoder.decoder"
    ):
        draw(pipe)
    pipe.autoencoder = autoencoder
    pipe.autoencoder.decoder = torch.compile(pipe.autoencoder.decoder, backend="eager")
    assert off(latents(pipe), expected) <= 1e-5
    pipe.flux = torch.compile(flux)
    with pytest.raises(
        RequestError, match="pipe.flux must be a Flux; to compile it, load the pipeline with compile=True"
    ):
        draw(pipe)
