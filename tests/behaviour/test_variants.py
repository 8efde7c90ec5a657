"""fe.ablate_each: many variants of one image in a few passes, with the numbers that they have one by one."""

from contextlib import ExitStack

import pytest
import torch
from runs import PROMPT, relative

import fluxedu as fe
from fluxedu.errors import InstrumentError

OPTIONS = {"steps": 3, "height": 48, "width": 32, "progress": False}
CFG = {"true_cfg_scale": 3.0, "negative_prompt": "a blue square"}


@pytest.fixture(scope="module")
def pipe(make_pipe):
    return make_pipe().to(torch.float64)


def variants():
    """Heads, a block, words, noise, two at once, the decoder, and nothing."""
    return [
        *(fe.ablate("double.1.heads", heads=[head]) for head in range(2)),
        fe.ablate("single.0", steps=[1]),
        [],
        fe.ablate("*.attn.map", tokens=["red"]),
        fe.intervene("vec", lambda x, ctx: x + torch.randn(x.shape, generator=ctx.generator).to(x)),
        [fe.ablate("double.0", streams="txt"), fe.ablate("single.1.heads", heads=[0], times=(0.5, 1.0))],
        fe.intervene("ae.decoder.mid", lambda x, ctx: 0 * x),
        fe.intervene("sample.noise", lambda x, ctx: -x),
    ]


@pytest.mark.parametrize("options", [{}, CFG, {"batch": 4}, {"batch": 1}, {"solver": "heun"}], ids=str)
def test_each_variant_is_the_run_with_its_interventions(options, pipe):
    out = fe.ablate_each(pipe, variants(), PROMPT, seed=4, **OPTIONS, **options)
    assert len(out.images) == len(variants()) and out.trajectory.latents.shape[1] == len(variants())
    for i, variant in enumerate(variants()):
        with ExitStack() as stack:
            for intervention in variant if isinstance(variant, list) else [variant]:
                stack.enter_context(intervention)
            alone = pipe(PROMPT, seed=4, **OPTIONS, **{k: v for k, v in options.items() if k != "batch"})
        assert relative(out.latents[i : i + 1], alone.latents) <= 1e-10, i
        assert relative(out.trajectory.velocities[:, i : i + 1], alone.trajectory.velocities) <= 1e-10, i
        levels = zip(out.images[i].tobytes(), alone.images[0].tobytes(), strict=True)
        assert max(abs(x - y) for x, y in levels) <= 1, i
    changed = [relative(out.latents[i], out.latents[3]) for i in (0, 1, 2, 4, 5, 6, 8)]
    assert min(changed) > 1e-6


def test_heads_by_hand(pipe):
    """Against PyTorch alone: a hook on the layer after the heads sets those of one row of the batch to zero."""
    heads = pipe.flux.config.num_heads
    out = fe.ablate_each(pipe, [fe.ablate("double.1.heads", heads=[h]) for h in range(heads)], PROMPT, **OPTIONS)

    def without_heads(module, inputs):
        x = inputs[0].clone().unflatten(-1, (heads, -1))  # [B, S, H, d]
        x[range(heads), :, range(heads)] = 0
        return (x.flatten(-2),)

    block = pipe.flux.double_blocks[1]
    hooks = [attn.proj.register_forward_pre_hook(without_heads) for attn in (block.img_attn, block.txt_attn)]
    by_hand = pipe([PROMPT] * heads, seed=0, **OPTIONS)
    for hook in hooks:
        hook.remove()
    assert relative(out.latents, by_hand.latents) <= 1e-10
    assert relative(out.latents[0], out.latents[1]) > 1e-3


def test_a_recorder_receives_variant_i_as_image_i(pipe):
    with fe.record("double.1.heads") as rec:
        fe.ablate_each(pipe, [[], fe.ablate("double.1.heads", heads=[1])], PROMPT, **OPTIONS)
    value = rec["double.1.heads"].tensor  # [picture, step, head, token, channel]
    assert value.shape[0] == 2 and bool((value[1, :, 1] == 0).all()) and not bool((value[0, :, 1] == 0).any())


def test_an_encoded_prompt(pipe):
    with torch.no_grad():
        encoded = pipe.prompt_encoder([PROMPT])
    changes = [[], fe.ablate("single.0")]
    out = fe.ablate_each(pipe, changes, encoded, **OPTIONS)
    assert relative(out.latents[:1], pipe(PROMPT, **OPTIONS).latents) <= 1e-10


def test_an_intervention_can_be_used_again_afterwards(pipe):
    change = fe.ablate("single.0")
    fe.ablate_each(pipe, [[], change], PROMPT, **OPTIONS)
    with change:
        changed = pipe(PROMPT, **OPTIONS).latents
    assert relative(changed, pipe(PROMPT, **OPTIONS).latents) > 1e-3


@pytest.mark.parametrize(
    ("interventions", "arguments", "message"),
    [
        ([], {}, "interventions must be a list with at least one entry"),
        (lambda: fe.ablate("single.0"), {}, "interventions must be a list"),
        (["single.0"], {}, "an entry must be an intervention or a list of them, not 'single.0'"),
        ([["single.0"]], {}, "an entry must be an intervention or a list of them"),
        (lambda: [fe.ablate("single.0")] * 2, {}, "each intervention can be listed only once"),
        (lambda: [fe.ablate("t5.*.heads", heads=[0])], {}, "all variants share the text encoders"),
        (lambda: [fe.ablate("clip.*.heads", heads=[0])], {}, "all variants share the text encoders"),
        ([[]], {"prompt": [PROMPT, "a red star"]}, "give one prompt and one seed"),
        ([[]], {"seed": [1, 2]}, "give one prompt and one seed"),
        ([[]], {"num_images": 2}, "num_images= cannot be used here"),
    ],
)
def test_what_is_refused(interventions, arguments, message, pipe, nothing_stays):
    interventions = interventions() if callable(interventions) else interventions
    with pytest.raises(InstrumentError, match=message):
        fe.ablate_each(pipe, interventions, **{"prompt": PROMPT, **OPTIONS, **arguments})
