"""Calls with values that make no sense are answered in a sentence, whatever the value is."""

import inspect

import pytest
import torch
from fuzzing import ODD, fuzz, guarded, is_a_sentence
from runs import draw
from sizes import TINY
from torch import nn

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments import lenses
from fluxedu.models import VARIANTS, Flux, FluxConfig
from fluxedu.models.attention import SelfAttention

GLOBS = [
    "double.*.attn.map", "double.1.heads", "single.*.gate", "double.0", "single.*", "*", "double.1.img_attn.q",
    "sample.x0", "t5.*", "nowhere", "[", "double.*.attn.rope", "single.1.attn.map", "double.0.img_mod1.gate", "clip.*",
]  # fmt: skip
GOOD = {
    "seed": [0, 7, [0, 1], 2**63 - 1],
    "steps": [1, 2],
    "guidance": [0, 3.5, 1],
    "true_cfg_scale": [1, 2.0],
    "guidance_interval": [(0.0, 1.0), [0.2, 0.8], (0.5, 0.5)],
    "height": [16, 24, 32],
    "width": [16, 33],
    "solver": ["euler", "midpoint", "heun"],
    "negative_prompt": ["", "a blue circle", ["x"]],
    "strength": [0.5, 1.0],
    "image": [torch.zeros(3, 16, 16)],
    "rounding": ["up", "down", "nearest"],
    "trajectory": [True, False],
}


THINGS = [value for value in ODD if not callable(value)]  # what a function of somebody's raises is that function's


def some(chance, good: dict, odd=ODD, rate=0.4) -> dict:
    """A few of the arguments, most of them sensible."""
    names = chance.sample(list(good), chance.randrange(len(good) + 1))
    return {name: chance.choice(odd if chance.random() < rate else good[name]) for name in names}


def small(request: dict) -> bool:
    """Is it drawn quickly, if at all? 1000 steps are a valid request, but too slow here."""
    sizes = [request.get(name, 1) for name in ("steps", "height", "width")]
    return all(not isinstance(s, int) or s <= 64 or s > 5000 for s in sizes)


def test_pipelines(pipe, plain_pipe, tmp_path):
    def case(chance):
        prompt = chance.choice(["a red circle", "", ["x", "y"], "é" * 20, "red " * 50, chance.choice(ODD)])
        request = some(chance, GOOD, rate=0.25)
        if small(request):
            one = chance.choice((pipe, plain_pipe))
            one(prompt, **{"steps": 1, "height": 16, "width": 16, "progress": False, **request})

    fuzz("pipelines", 0.08, case, tmp_path)


def test_configs(tmp_path):
    """Any values: a configuration, or a sentence; and a configuration is one of a network that can be built."""
    kinds = [type(config) for config in TINY]

    def case(chance):
        config = chance.choice(TINY)
        values = config.to_dict()
        for name in chance.sample(list(values), chance.randrange(1, 4)):
            values[name] = chance.choice([chance.choice(ODD), chance.randrange(-2, 70), [chance.randrange(9)] * 3])
        if chance.random() < 0.1:
            values[chance.choice(["x", "", 3, None, ("a",)])] = 1
        if chance.random() < 0.05:
            values = chance.choice(ODD)
        made = chance.choice([type(config)] * 3 + kinds).from_dict(values)
        assert made == type(made).from_dict(made.to_dict())
        if isinstance(made, FluxConfig) and made.depth + made.depth_single_blocks < 9:
            with torch.device("meta"):
                Flux(made)

    fuzz("configs", 0.1, case, tmp_path)


def test_variants_and_loading(tmp_path):
    def case(chance):
        name = chance.choice([*VARIANTS, "nano", *ODD, "\x00", str(tmp_path), "../..", "a" * 5000, "org/model"])
        if chance.random() < 0.5:
            FluxConfig.variant(name)
        else:
            options = some(chance, {"device": ["cpu", "meta", "cuda:99", "x:y"], "dtype": ["bfloat16", torch.float16]})
            fe.load(name, **options)

    fuzz("loading", 0.04, case, tmp_path)


def test_recording(pipe, tmp_path):
    good = {
        "steps": [0, [0, 1], slice(None), -1],
        "tokens": ["red", ["red", 0], 3, [0, 1]],
        "heads": [0, [1], [0, 1], -1],
        "reduce": [
            "head-mean",
            "entropy",
            "norm",
            "rms",
            "summary",
            "cosine",
            "step-mean",
            "top-2",
            ["head-mean", "norm"],
        ],
        "passes": ["prompted", "negative", None],
        "budget": [2**30, 100],
        "dtype": [torch.float16, torch.float64],
    }

    def case(chance):
        globs = [chance.choice(GLOBS if chance.random() < 0.9 else ODD) for _ in range(chance.choice((1, 1, 2)))]
        with fe.record(*globs, **some(chance, good, THINGS, 0.2)) as recorder:
            pipe("a red circle", steps=2, height=16, width=16, progress=False)
        for name in recorder:
            assert recorder.entries(name)

    fuzz("recording", 0.08, case, tmp_path)


def test_intervening(pipe, tmp_path):
    good = {
        "steps": [0, [0, 1], slice(None), -1],
        "times": [(0.5, 1.0), [0, 1]],
        "tokens": ["red", ["red", 0], 3, [0, 1]],
        "heads": [0, [1], [0, 1], -1],
        "streams": ["txt", "img", ["txt", "img"]],
        "to": [0.0, "mean", 1],
    }

    def changed(chance):
        """What a learner's function might give."""
        return chance.choice(
            (
                lambda x, c: x,
                lambda x, c: 0 * x if isinstance(x, torch.Tensor) else x,
                lambda x, c: None,
                lambda x, c: x[..., :1] if isinstance(x, torch.Tensor) else 3,
                *[3, None],
            )
        )

    def case(chance):
        globs = [chance.choice(GLOBS if chance.random() < 0.9 else ODD) for _ in range(chance.choice((1, 1, 2)))]
        kind = chance.randrange(3)
        if kind == 0:
            change = fe.ablate(*globs, **some(chance, good, rate=0.2))
        elif kind == 1:
            when = some(chance, {name: good[name] for name in ("steps", "times")}, rate=0.3)
            change = fe.intervene(*globs, changed(chance), **when)
        else:
            change = fe.patch(globs[0], chance.choice([torch.zeros(1), torch.zeros(1, 16, 16, 16), *ODD]))
        with change:
            pipe("a red circle", steps=2, height=16, width=16, progress=False)

    fuzz("intervening", 0.08, case, tmp_path)


def test_lenses(pipe, tmp_path):
    good = {
        "words": [["circle"], ["red", "circle"]],
        "query": ["red", (0, 0), [1, 1]],
        "at_step": [0, -1],
        "at_steps": [0, [0, 1], slice(None)],
        "decoded": [True, False],
        "probes": [1],
        "size": [2, 3],
        "reach": [0.5],
        "times": [2, [0.5, 0.1]],
        "guidance": [3.5],
        "seed": [0, 7],
        "trajectory": [draw(pipe).trajectory],
    }

    def case(chance):
        name = chance.choice(lenses.__all__)
        takes = inspect.signature(getattr(lenses, name)).parameters
        request = some(chance, {key: good[key] for key in takes if key in good}, THINGS, 0.2)
        for key, argument in takes.items():  # what is needed is there
            if key in good and argument.default is argument.empty:
                request.setdefault(key, good[key][0])
        start = {"pipe": pipe, "prompt": chance.choice(["a red circle"] * 9 + ODD)}
        small = {"steps": 2, "height": 16, "width": 16, "progress": False} if "options" in takes else {}
        getattr(lenses, name)(**{key: value for key, value in start.items() if key in takes}, **request, **small)

    fuzz("lenses", 0.06, case, tmp_path)


class Narrow(nn.Module):
    def __init__(self, *sizes):
        super().__init__()

    def forward(self, x):
        return x


def test_swapping(pipe, tmp_path):
    globs = [
        "double.*.img_attn",
        "single.0",
        "final_layer",
        "double.0.img_mlp",
        "*",
        "double.*.img_mod1",
        "nowhere",
        "[",
    ]
    new = [SelfAttention, Narrow, lambda old: old, lambda old: None, nn.Identity(), nn.Identity]

    def case(chance):
        glob = chance.choice(globs if chance.random() < 0.9 else ODD)
        with fe.swap(
            glob, chance.choice(new if chance.random() < 0.9 else THINGS), **some(chance, {"pipe": [pipe]}, rate=0.2)
        ):
            pipe("a red circle", steps=1, height=16, width=16, progress=False)

    before = {name: [type(m) for m in module.modules()] for name, module in pipe.networks().items()}
    fuzz("swapping", 0.04, case, tmp_path)
    assert before == {name: [type(m) for m in module.modules()] for name, module in pipe.networks().items()}


def test_nobody_is_left_looking(pipe):
    """After all of the above the sites are idle again."""
    assert not fe.probe.is_watching()


def test_sites(tmp_path):
    """Of what is no pipeline, network or variant."""
    for value in (value for value in ODD if value is not None):
        with guarded(tmp_path), pytest.raises(InstrumentError) as error:
            fe.sites(value)
        assert is_a_sentence(error.value)
