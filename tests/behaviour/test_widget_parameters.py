"""The parameters of every variant by name, without a weight: the published numbers, and both layouts' names."""

import pytest
import torch

import fluxedu as fe
from fluxedu.models import VARIANTS, FluxConfig
from fluxedu.widgets.parameters import REST, SIZE, kinds, numberless, parameters, parts, rectangles

PUBLISHED = {
    "schnell": (11_891_178_560, 776),
    "dev": (11_901_408_320, 780),
    "fill": (11_902_391_360, 780),
    "canny": (11_901_604_928, 780),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name):
    those = kinds(FluxConfig.variant(name))
    assert (sum(kind.numbers for kind in those), sum(kind.many for kind in those)) == PUBLISHED[name]


def test_every_parameter_is_in_one_part():
    those = kinds(FluxConfig.variant("dev"))
    groups = parts(those)
    assert sorted(kind.name for group in groups.values() for kind in group) == sorted(kind.name for kind in those)
    assert list(groups)[-1] == REST and sum(kind.numbers for kind in groups[REST]) < 0.01 * 11_901_408_320
    modulation = sum(kind.numbers for name in groups if "mod" in name for kind in groups[name])
    assert 0.26 < modulation / 11_901_408_320 < 0.28


def test_areas_are_shares():
    sizes = {"double_blocks.img_mlp": 60, "single_blocks.linear1": 30, REST: 10}
    boxes = rectangles(sizes)
    areas = [(w + 2) * (h + 2) / (SIZE[0] * SIZE[1]) for _, _, _, w, h, _ in boxes]
    assert areas == pytest.approx([0.6, 0.3, 0.1])


def test_names_are_those_of_the_conversion():
    config = fe.load().flux.config
    ours = fe.load().flux.state_dict()
    theirs = fe.checkpoints.convert(ours, to="diffusers", config=config)
    told = {kind.name: kind for kind in kinds(config)}
    assert {numberless(name) for name in ours} == set(told)
    assert {numberless(name) for name in theirs} == {name for kind in told.values() for name in kind.theirs}
    fused = told["single_blocks.#.linear1.weight"]
    assert fused.many == config.depth_single_blocks and len(fused.theirs) == 4
    block = "single_transformer_blocks.2."
    rows = [theirs[name.replace("single_transformer_blocks.#.", block)] for name in fused.theirs]
    assert torch.equal(torch.cat(rows), ours["single_blocks.2.linear1.weight"])


def test_the_explorer_moves():
    made = parameters({"mine": FluxConfig(hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1)})
    assert "11,901,408,320 parameters in 780 tensors" in made.view["text"]
    names = list(parts(kinds(FluxConfig.variant("dev"))))
    made.set(part=names.index("double_blocks.txt_attn"), tensor=0)
    assert "attn.add_q_proj.weight, attn.add_k_proj.weight, attn.add_v_proj.weight" in made.view["text"]
    first, second = made.now().panels
    assert first.mark == names.index("double_blocks.txt_attn") and second.mark == 0
    made.set(variant="mine", part=99, tensor=99)  # a place that this variant has not: the last one it has
    assert "mine" in made.view["text"]
    assert [made.set(variant=name).view["text"].split(":")[0] for name in VARIANTS] == list(VARIANTS)
