"""The parameters of every variant by name, without a weight: the published numbers, and both layouts' names."""

import pytest
import torch

import fluxedu as fe
from fluxedu.models import VARIANTS, FluxConfig
from fluxedu.widgets.parameters import REST, SIZE, network_parts, parameters, rectangles, tensor_groups, without_number

PUBLISHED = {
    "schnell": (11_891_178_560, 776),
    "dev": (11_901_408_320, 780),
    "fill": (11_902_391_360, 780),
    "canny": (11_901_604_928, 780),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name):
    those = tensor_groups(FluxConfig.variant(name))
    assert (sum(group.size for group in those), sum(group.count for group in those)) == PUBLISHED[name]


def test_every_parameter_is_in_one_part():
    those = tensor_groups(FluxConfig.variant("dev"))
    groups = network_parts(those)
    assert sorted(group.name for group in groups.values() for group in group) == sorted(group.name for group in those)
    assert list(groups)[-1] == REST and sum(group.size for group in groups[REST]) < 0.01 * 11_901_408_320
    modulation = sum(group.size for name in groups if "mod" in name for group in groups[name])
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
    groups = {group.name: group for group in tensor_groups(config)}
    assert {without_number(name) for name in ours} == set(groups)
    named = {name for group in groups.values() for name in group.diffusers_names}
    assert {without_number(name) for name in theirs} == named
    fused = groups["single_blocks.#.linear1.weight"]
    assert fused.count == config.depth_single_blocks and len(fused.diffusers_names) == 4
    block = "single_transformer_blocks.2."
    rows = [theirs[name.replace("single_transformer_blocks.#.", block)] for name in fused.diffusers_names]
    assert torch.equal(torch.cat(rows), ours["single_blocks.2.linear1.weight"])


def test_the_explorer_moves():
    made = parameters({"mine": FluxConfig(hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1)})
    assert "11,901,408,320 parameters in 780 tensors" in made.view["text"]
    names = list(network_parts(tensor_groups(FluxConfig.variant("dev"))))
    made.set(part=names.index("double_blocks.txt_attn"), tensor=0)
    assert "attn.add_q_proj.weight, attn.add_k_proj.weight, attn.add_v_proj.weight" in made.view["text"]
    first, second = made.current_view().panels
    assert first.mark == names.index("double_blocks.txt_attn") and second.mark == 0
    made.set(variant="mine", part=99, tensor=99)  # indices past the end of this variant: the last ones are used
    assert "mine" in made.view["text"]
    assert [made.set(variant=name).view["text"].split(":")[0] for name in VARIANTS] == list(VARIANTS)
