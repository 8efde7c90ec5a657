"""Attention maps beside those of diffusers' processors, made to compute the map; and the network without its sites."""

import pytest
import torch
from oracle import cast, float64_flux
from rounding import Exact

import fluxedu as fe
from benchmarks.instruments import WORDS, diffusers_word_maps
from benchmarks.speed import diffusers_inputs, diffusers_model, random_inputs
from fluxedu.models import Flux, FluxConfig
from fluxedu.probe import Sited

SMALL = FluxConfig(
    hidden_size=96,
    num_heads=4,
    depth=2,
    depth_single_blocks=3,
    context_in_dim=40,
    vec_in_dim=24,
    axes_dim=(4, 10, 10),
    guidance_embed=True,
)


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    flux = Flux(SMALL).eval().requires_grad_(False)
    for p in (p for p in flux.parameters() if p.ndim > 1):
        p *= 3**0.5
    return flux


def test_maps_of_every_block(flux):
    x, kept = random_inputs(SMALL, 5, 24), []
    with torch.no_grad(), diffusers_word_maps(kept, 24):
        (theirs,) = diffusers_model(flux)(**diffusers_inputs(x))
    how = {"tokens": list(range(WORDS)), "reduce": "head-mean", "dtype": torch.float16}
    with fe.record("*.attn.map", **how) as rec, fe.record("*.attn.map") as full:
        ours = flux(**x)
    reference, x64 = float64_flux(SMALL, flux.state_dict()), cast(x, torch.float64)
    with torch.no_grad():
        exact = Exact(lambda: reference(**diffusers_inputs(x64))[0])
    exact.check(theirs, torch.float32)
    exact.check(ours, torch.float32)
    assert len(kept) == len(rec) == 5
    for site, map_ in zip(rec, kept, strict=True):
        assert (
            float((rec[site].tensor[0].float() - map_[0].float()).abs().max()) <= 2**-11
        )  # half precision's last place
        assert float((full[site].tensor[0].mean(0)[24:, :WORDS] - map_[0].float()).abs().max()) <= 2**-11


def test_sites_change_nothing(flux, monkeypatch):
    """Watched, unwatched, or taken out altogether: the same result to the last bit."""
    x, everything = random_inputs(SMALL, 3, 8), ("double.*", "single.*", "vec*", "*_in", "velocity")
    with torch.no_grad():
        unwatched = flux(**x)
        with fe.record(*everything) as rec:
            assert torch.equal(flux(**x), unwatched)
        assert len(rec) > 90
        monkeypatch.setattr(Sited, "probe", lambda self, name, value: value)
        monkeypatch.setattr(Sited, "is_watched", lambda self, name: False)
        with fe.record(*everything) as rec:
            assert torch.equal(flux(**x), unwatched)
        assert len(rec) == 0
