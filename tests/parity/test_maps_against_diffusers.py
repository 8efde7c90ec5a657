"""Attention maps beside those of diffusers' processors, made to write the map down; and the code without its sites."""

import pytest
import torch

import fluxedu as fe
from fluxedu import bench
from fluxedu.bench.instruments import WORDS, materialised, without_sites
from fluxedu.bench.speed import asked_of, inputs_of, reference_of
from fluxedu.models import Flux, FluxConfig

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
    x, kept = inputs_of(SMALL, 5, 24), []
    with torch.no_grad(), materialised(kept, 24):
        (theirs,) = reference_of(flux)(**asked_of(x))
    how = {"tokens": list(range(WORDS)), "reduce": "head-mean", "dtype": torch.float16}
    with fe.record("*.attn.map", **how) as rec, fe.record("*.attn.map") as whole:
        ours = flux(**x)
    assert float((ours - theirs).norm() / theirs.norm()) <= 2e-6
    assert len(kept) == len(rec) == 5
    for site, map_ in zip(rec, kept, strict=True):
        assert (
            float((rec[site].tensor[0].float() - map_[0].float()).abs().max()) <= 2**-11
        )  # half precision's last place
        assert float((whole[site].tensor[0].mean(0)[24:, :WORDS] - map_[0].float()).abs().max()) <= 2**-11


def test_the_code_without_sites_is_the_code(flux):
    bare = without_sites()(SMALL).eval()
    bare.load_state_dict(flux.state_dict())
    x = inputs_of(SMALL, 3, 8)
    with fe.record("double.*", "single.*", "vec*", "*_in", "velocity") as rec, torch.no_grad():
        there = bare(**x)
        assert len(rec) == 0
        assert torch.equal(there, flux(**x))
        assert len(rec) > 90


def test_every_bar_has_a_figure():
    ratio = {"ratio": 1.0, "memory_ratio": 1.0, "bytes": 1, "least_bytes": 1}
    training = {"samples_per_second": 1.0, "steps_per_second": 1.0, "share_of_matmul_peak": 0.5, "dtype": "float32"}
    said = bench.table({name: ratio for name in bench.BARS} | {"training": training, "threads": 2})
    assert all(name in said for name in bench.BARS)
