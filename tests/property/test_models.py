"""What is true of the flow transformer whatever its weights are."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxedu import probe
from fluxedu.errors import ConfigError
from fluxedu.models import VARIANTS, AutoEncoderConfig, CLIPTextConfig, CLIPTextEncoder, Flux, FluxConfig

TINY = FluxConfig(
    in_channels=12,
    out_channels=20,
    vec_in_dim=10,
    context_in_dim=18,
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 8, 12),
)
# Relative, in float64, whose rounding errors are 1e-16: the same sums in another order. The networks are small and well
# conditioned, so no kernel comes near this bound. In float32 the margin would depend on the machine.
ROUNDING = 1e-12


def relative(a, b):
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def flux(seed=0, **changes):
    """A float64 network with random values in every tensor."""
    model = Flux(TINY.with_(**changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                noise / p[0].numel() ** 0.5
                if p.ndim > 1
                else 1 + 0.3 * noise
                if name.endswith("scale")
                else 0.3 * noise
            )
    return model.requires_grad_(False)


def arguments(config=TINY, batch=2, grid=(3, 5), text=6, seed=1):
    """The arguments of ``forward``."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator).double()  # noqa: E731
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(1.0 * grid[0]), torch.arange(1.0 * grid[1]))
    return {
        "img": normal(batch, len(ids), config.in_channels),
        "img_ids": ids.expand(batch, -1, -1),
        "txt": normal(batch, text, config.context_in_dim),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.rand(batch, generator=generator),
        "y": normal(batch, config.vec_in_dim),
        "guidance": 1 + 4 * torch.rand(batch, generator=generator),
    }


def drawn(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


seeds = st.integers(0, 2**31)
grids = st.tuples(st.integers(2, 6), st.integers(2, 6))
texts = st.integers(1, 9)


# --- positions ------------------------------------------------------------------------------------


@drawn(15)
@given(seeds, grids, texts, st.tuples(*[st.integers(-40, 40)] * 3))
def test_only_differences_of_positions_count(seed, grid, text, by):
    model, x = flux(seed), arguments(grid=grid, text=text, seed=seed)
    by = torch.tensor(by, dtype=torch.float32)
    moved = {**x, "img_ids": x["img_ids"] + by, "txt_ids": x["txt_ids"] + by}
    assert relative(model(**moved), model(**x)) <= ROUNDING


@drawn(15)
@given(seeds, grids, st.integers(3, 9), st.sampled_from(([1, 0, 0], [0, 1, 0], [0, 0, 1])))
def test_moving_the_picture_away_from_the_text_is_seen(seed, grid, text, by):
    model, x = flux(seed), arguments(grid=grid, text=text, seed=seed)
    moved = {**x, "img_ids": x["img_ids"] + torch.tensor(by)}
    assert relative(model(**moved), model(**x)) > 1e-3


@drawn(15)
@given(seeds, grids, st.randoms(use_true_random=False))
def test_text_tokens_have_no_order(seed, grid, random):
    model, x = flux(seed), arguments(grid=grid, text=7, seed=seed)
    order = random.sample(range(7), 7)
    assert relative(model(**{**x, "txt": x["txt"][:, order]}), model(**x)) <= ROUNDING


def test_image_tokens_have_an_order():
    """Moved without their ids they are another picture, moved with them the same one, re-listed."""
    model, x = flux(), arguments()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    before = model(**x)[:, order]
    assert relative(model(**{**x, "img": x["img"][:, order]}), before) > 1e-2
    assert relative(model(**{**x, "img": x["img"][:, order], "img_ids": x["img_ids"][:, order]}), before) <= ROUNDING


def test_ids_may_leave_out_the_batch():
    model, x = flux(), arguments()
    assert torch.equal(model(**{**x, "img_ids": x["img_ids"][0], "txt_ids": x["txt_ids"][0]}), model(**x))


@drawn(10)
@given(seeds)
def test_each_picture_of_a_batch_has_its_own_positions(seed):
    model, x = flux(seed), arguments(batch=2, seed=seed)
    x["img_ids"] = torch.stack([x["img_ids"][0], x["img_ids"][0] * torch.tensor([1, 3, 2])])
    assert relative(model(**x), alone(model, x)) <= ROUNDING


# --- batches and plans ----------------------------------------------------------------------------


def alone(model, x):
    """Every picture of the batch in a pass of its own."""
    return torch.cat([model(**{n: v[i : i + 1] for n, v in x.items()}) for i in range(len(x["img"]))])


@drawn(15)
@given(seeds, grids, texts)
def test_a_batch_is_its_pictures(seed, grid, text):
    model, x = flux(seed), arguments(batch=2, grid=grid, text=text, seed=seed)
    assert relative(model(**x), alone(model, x)) <= ROUNDING


@drawn(15)
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_a_plan_of_all_steps_is_forward_in_each(seed, batch, steps, guided):
    model, x = flux(seed, guidance_embed=guided), arguments(batch=batch, seed=seed)
    times = torch.linspace(1, 0.1, steps)
    guidance = x["guidance"] = x["guidance"] if guided else None
    rope, plans = model.rope(x["img_ids"], x["txt_ids"]), model.plan(times[:, None], guidance, x["y"])
    seen = 0
    for i, plan in enumerate(plans):
        expected = model(**{**x, "timesteps": times[i].expand(batch)})
        assert relative(model.velocity(x["img"], x["txt"], rope, plan), expected) <= ROUNDING
        assert torch.equal(plan.vec, plans[i].vec)
        seen += 1
    assert seen == steps


def test_guidance_is_ignored_where_there_is_none():
    model, x = flux(guidance_embed=False), arguments()
    with_it = model(**x)
    del x["guidance"]
    assert torch.equal(model(**x), with_it)


@pytest.mark.parametrize("name", ["img", "txt", "timesteps", "y", "guidance"])
def test_every_input_matters(name):
    model, x, other = flux(), arguments(), arguments(seed=9)
    assert relative(model(**{**x, name: other[name]}), model(**x)) > 1e-3


def test_closed_gates_make_every_block_do_nothing():
    """What is left is img_in and the last layer: the text still steers through vec."""
    model, x = flux(), arguments()
    with watching(lambda module, name, value: 0 * value if name.startswith("gate") else value):
        closed = model(**x)
    plan = model.plan(x["timesteps"], x["guidance"], x["y"])
    assert relative(closed, model.final_layer(model.img_in(x["img"]), plan.last)) <= ROUNDING


# --- sites ----------------------------------------------------------------------------------------


class watching:
    """``with watching(watcher):``, whatever happens inside."""

    def __init__(self, watcher):
        self.watcher = watcher

    def __enter__(self):
        self.previous = probe.watch(self.watcher)

    def __exit__(self, *_):
        probe.watch(self.previous)


@drawn(10)
@given(seeds, grids, texts)
def test_looking_changes_nothing(seed, grid, text):
    model, x = flux(seed), arguments(grid=grid, text=text, seed=seed)
    seen = []
    with watching(lambda module, name, value: seen.append(f"{module.site_path}.{name}".strip(".")) or value):
        watched = model(**x)
    assert torch.equal(watched, model(**x))
    assert len(seen) == len(set(seen)), "one site, one visit a pass"
    assert {"vec", "vec.time", "velocity", "double.1.img_attn.q", "double.0.attn.map", "single.1.heads"} <= set(seen)


def test_sites_are_the_same_with_a_plan():
    model, x = flux(), arguments()
    seen = ([], [])
    with watching(lambda module, name, value: seen[0].append((module.site_path, name)) or value):
        model(**x)
    plan = model.plan(x["timesteps"][:1, None], x["guidance"], x["y"])
    with watching(lambda module, name, value: seen[1].append((module.site_path, name)) or value):
        model.velocity(x["img"], x["txt"], model.rope(x["img_ids"], x["txt_ids"]), plan[0])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("site", "given_instead"),
    [("vec", ("timesteps", "y", "guidance")), ("vec.text", ("y",)), ("vec.time", ("timesteps",))],
)
def test_a_replaced_vec_acts(site, given_instead):
    """Putting another pass's value in is giving that pass's arguments."""
    model, x, other = flux(), arguments(), arguments(seed=9)
    plan = model.plan(other["timesteps"], other["guidance"], other["y"])
    value = plan.vec if site == "vec" else plan.terms[site.removeprefix("vec.")]
    with watching(lambda module, name, old: value if module is model and name == site else old):
        replaced = model(**x)
    assert relative(replaced, model(**{**x, **{n: other[n] for n in given_instead}})) <= ROUNDING
    assert relative(replaced, model(**x)) > 1e-3


def test_the_lazy_map_is_the_map():
    """Materialised and put back, the attention map gives the same velocity; made uniform, another."""
    model, x = flux(), arguments()

    def put_back(change):
        return lambda module, name, value: change(value.weights()) if name == "attn.map" else value

    with watching(put_back(lambda w: w)):
        same = model(**x)
    assert relative(same, model(**x)) <= ROUNDING
    with watching(put_back(lambda w: torch.full_like(w, 1 / w.shape[-1]))):
        assert relative(model(**x), same) > 1e-3


def test_a_row_of_the_map_is_the_row():
    model, x = flux(), arguments()

    def check(module, name, value):
        if name == "attn.map":
            full = value.weights()
            assert full.shape == value.shape == (2, 2, 21, 21)
            assert relative(value.rows([2, 7]), full[:, :, [2, 7]]) <= ROUNDING
            assert relative(value.rows(3), full[:, :, 3:4]) <= ROUNDING
            assert relative(full.sum(-1), torch.ones(2, 2, 21)) <= ROUNDING
        return value

    with watching(check):
        model(**x)


# --- names ----------------------------------------------------------------------------------------

WB = r"\.(weight|bias)"
OFFICIAL_NAMES = {
    "outside": (r"(img_in|txt_in|final_layer\.linear|final_layer\.adaLN_modulation\.1)" + WB, 8),
    "embedders": (r"(time_in|vector_in|guidance_in)\.(in_layer|out_layer)" + WB, 12),
    "double": (r"double_blocks\.0\.(img|txt)_(mod\.lin|attn\.qkv|attn\.proj|mlp\.0|mlp\.2)" + WB, 20),
    "double norms": (r"double_blocks\.0\.(img|txt)_attn\.norm\.(query|key)_norm\.scale", 4),
    "single": (r"single_blocks\.0\.(modulation\.lin|linear1|linear2)" + WB, 6),
    "single norms": (r"single_blocks\.0\.norm\.(query|key)_norm\.scale", 2),
}


def test_names_are_the_official_ones():
    names = set(Flux(TINY.with_(depth=1, depth_single_blocks=1)).state_dict())
    for kind, (pattern, count) in OFFICIAL_NAMES.items():
        matched = {n for n in names if re.fullmatch(pattern, n)}
        assert len(matched) == count, kind
        names -= matched
    assert not names


def test_without_guidance_there_is_no_guidance_tensor():
    with_it, without = (set(Flux(TINY.with_(guidance_embed=g)).state_dict()) for g in (True, False))
    assert {n.split(".")[0] for n in with_it - without} == {"guidance_in"}
    assert without < with_it


def test_without_qkv_bias_only_the_double_blocks_lose_one():
    with_it, without = (set(Flux(TINY.with_(qkv_bias=b)).state_dict()) for b in (True, False))
    assert all(n.endswith("_attn.qkv.bias") for n in with_it - without)
    assert len(with_it - without) == 2 * TINY.depth


# --- what is refused ------------------------------------------------------------------------------


def test_guidance_is_required():
    x = arguments()
    del x["guidance"]
    with pytest.raises(ValueError, match="guidance"):
        flux()(**x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"img": torch.zeros(2, 15, 13)}, "img must be .*12"),
        ({"img": torch.zeros(15, 12)}, "img must be"),
        ({"txt": torch.zeros(2, 6, 4)}, "txt must be .*18"),
        ({"txt": torch.zeros(2, 7, 18)}, "7 \\(text\\) \\+ 15 \\(image\\) = 22, not 21"),
        ({"img_ids": torch.zeros(2, 15, 2), "txt_ids": torch.zeros(2, 6, 2)}, "not 2"),
    ],
)
def test_inputs_that_do_not_fit(change, match):
    with pytest.raises(ValueError, match=match):
        flux()(**{**arguments(), **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_heads": 5}, "hidden_size 48 .* num_heads 5"),
        ({"axes_dim": (4, 8, 10)}, "adds up to 22.* 24"),
        ({"axes_dim": (3, 9, 12)}, "even"),
        ({"axes_dim": (0, 12, 12)}, "even and positive"),
        ({"depth": -1}, "negative"),
        ({"depth_single_blocks": -1}, "negative"),
        ({"in_channels": 0}, "in_channels"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_configs_that_describe_no_network(change, match):
    with pytest.raises(ConfigError, match=match):
        TINY.with_(**change)


def test_config_errors_name_what_was_given():
    with pytest.raises(ConfigError, match="'hidden'"):
        FluxConfig.from_dict({"hidden": 3})
    with pytest.raises(ConfigError, match="'pro'.*schnell"):
        FluxConfig.variant("pro")
    with pytest.raises(ConfigError, match="multiple of norm_groups = 32, not 48"):
        AutoEncoderConfig(ch=48)
    with pytest.raises(ConfigError, match="level"):
        AutoEncoderConfig(ch_mult=())
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_survive_a_dictionary(name):
    config = FluxConfig.variant(name)
    assert FluxConfig.from_dict(config.to_dict()) == config
    assert all(type(v) in (int, float, bool, list) for v in config.to_dict().values())


def test_lists_are_taken_for_tuples():
    """As from JSON or a careless hand: equal, and a key of a dictionary all the same."""
    for config, field in ((TINY, "axes_dim"), (AutoEncoderConfig(), "ch_mult")):
        same = config.with_(**{field: list(getattr(config, field))})
        assert same == config and hash(same) == hash(config)


def test_clip_refuses_what_others_pool_wrongly():
    config = CLIPTextConfig(20, 8, 8, 1, 2, max_position_embeddings=5, eos_token_id=19)
    encoder = CLIPTextEncoder(config)
    with pytest.raises(ValueError, match="end-of-text token 19"):
        encoder(torch.tensor([[1, 19, 2], [1, 2, 3]]))
    with pytest.raises(ValueError, match="at most 5 tokens.* not 6"):
        encoder(torch.full((1, 6), 19))
