"""Data sets of lenses, and what a sweep leaves to the model: its device, its dtype."""

import json
import textwrap
from pathlib import Path

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import SweepError
from fluxedu.instruments import lenses
from fluxedu.sweep import config, from_dict, open_sweep, read_config, run_sweep
from fluxedu.sweep.config import SINGLE_RUN_LENSES
from fluxedu.sweep.run import Runner, _load

PROMPT = "a red circle left of a blue square"
GIVEN = {
    "attention_balance": {},
    "concept_maps": {"words": ["circle", "blue"], "at_steps": [0]},
    "contributions": {},
    "head_gallery": {"query": [1, 0], "at_step": 0},
    "massive_activations": {"at_step": 1},
    "padding_mass": {"at_steps": [1]},
    "word_maps": {"words": ["circle"]},
}
SMALL = {"settings": {"steps": 2, "height": 32, "width": 32}}


def test_every_lens_that_can_be_named_is_tried_here():
    assert set(GIVEN) == set(SINGLE_RUN_LENSES) < set(lenses.__all__)


@pytest.mark.parametrize("change", ["as it is", "no head 1"])
def test_what_a_lens_finds_is_what_it_finds_by_hand(pipe, change):
    """All in one run, without a picture drawn for any of them, and under an intervention as well."""
    interventions = {"as it is": [], "no head 1": {"ablate": "double.1.heads", "heads": [1]}}
    sweep = from_dict({"prompts": [PROMPT], "interventions": interventions, "lens": GIVEN, **SMALL})
    drawn = []
    with fe.intervene("sample.noise", lambda x, ctx: drawn.append(1) or x):
        kept = Runner(sweep, pipe).draw(sweep.cell(list(interventions).index(change)))
    assert len(drawn) == 1
    options = {"seed": 0, **SMALL["settings"]}
    for name, given in GIVEN.items():
        if change == "as it is":
            found = getattr(lenses, name)(pipe, PROMPT, **given, **options)
        else:
            with fe.ablate("double.1.heads", heads=[1]):
                found = getattr(lenses, name)(pipe, PROMPT, **given, **options)
        value = kept[f"lens/{name}"]
        assert torch.equal(value.tensor, found.tensor), name
        assert value.axes == found.axes and value.coords == found.coords, name


def test_a_lens_data_set_is_read_by_name(tmp_path):
    """From disk, with axes and labels; the two cells differ."""
    lens = {"head_gallery": {"query": "red", "at_step": 0}, "contributions": {}}
    prompts = [PROMPT, "a red triangle"]
    results = open_sweep(
        run_sweep(from_dict({"prompts": prompts, "keep": ["latent"], "lens": lens, **SMALL}), tmp_path)
    )
    maps = [results[number]["lens/head_gallery"] for number in range(2)]
    assert maps[0].axes == ("block", "head", "row", "column") and maps[0].coords["block"][0] == "double.0"
    assert maps[0].tensor.shape == maps[1].tensor.shape and not torch.equal(maps[0].tensor, maps[1].tensor)
    assert set(results[0]) == {"latent", "lens/head_gallery", "lens/contributions"}


def test_a_word_that_a_prompt_lacks_is_reported_with_its_cell(pipe):
    sweep = from_dict({"prompts": ["a", PROMPT], "lens": {"word_maps": {"words": ["circle"]}}, **SMALL})
    runner = Runner(sweep, pipe)
    with pytest.raises(SweepError, match=r"cell 0 .*'circle'"):
        runner.draw(sweep.cell(0))
    assert "lens/word_maps" in runner.draw(sweep.cell(1))


@pytest.mark.parametrize(
    ("lens", "says"),
    [
        ({"word_maps": {"words": "a"}}, "words"),
        ({"head_gallery": {"query": [1]}}, "query"),
        ({"padding_mass": {"at_steps": "first"}}, "steps"),
        ({"massive_activations": {"at_step": "last"}}, "step"),
    ],
)
def test_a_lens_argument_of_the_wrong_kind_is_one_sentence(pipe, lens, says):
    """The lens's own, which names the argument and what it was."""
    sweep = from_dict({"prompts": ["a"], "lens": lens, **SMALL})
    with pytest.raises(SweepError, match=rf"^cell 0 \(.*\) cannot be drawn: .*{says}.*not .*\.$"):
        Runner(sweep, pipe).draw(sweep.cell(0))


def test_the_sweeps_in_the_documentation_can_be_read(tmp_path):
    """The one at the head of config.py, and the recipe's."""
    recipes = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text().split("```yaml\n")
    written = [textwrap.dedent(config.__doc__.split("\n\n")[1]), *(text.split("```")[0] for text in recipes[1:])]
    assert len(written) == 2
    for text in written:
        (tmp_path / "a.yaml").write_text(text)
        sweep = read_config(tmp_path / "a.yaml")
        assert sweep.lens and sweep.record and len(sweep.interventions) > 1


# ---------------------------------------------------------------- device and dtype


def opened(monkeypatch, **env) -> dict:
    """The arguments with which a sweep of ``dev`` calls :func:`fe.load`."""
    request, sweep = {}, env.pop("sweep", {})

    class Enough(Exception):
        pass

    def load(model, **options):
        request.update(options, model=model)
        raise Enough

    monkeypatch.setattr("fluxedu.load", load)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Enough):
        run_sweep(from_dict({"prompts": ["a"], "model": "dev", **sweep}), "nowhere")
    return request


def test_the_model_chooses_its_device_and_dtype(monkeypatch):
    nothing = dict.fromkeys(("device", "dtype", "like", "variant", "revision"))
    assert opened(monkeypatch) == {"model": "dev", **nothing}
    choices = {"device": "cpu", "dtype": "float32"}
    assert opened(monkeypatch, sweep=choices) == {"model": "dev", **nothing, **choices}


@pytest.mark.parametrize(("device", "given"), [(None, None), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_worker_of_a_local_cluster_has_a_gpu_of_its_own(monkeypatch, device, given):
    """The sixth of eight workers where there are two GPUs; on another cluster, whoever starts a worker gives it one."""
    current, loaded = [], {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("fluxedu.load", lambda model, **options: loaded.update(options))
    description = json.dumps(vars(from_dict({"prompts": ["a"], "device": device})))
    _load.__wrapped__(description, 5)
    assert loaded["device"] == given
    assert current == ([] if device == "cpu" else [1])
    _load.__wrapped__(description, "tcp://127.0.0.1:4000")
    assert loaded["device"] == device and len(current) <= 1


def test_a_set_is_not_continued_on_other_numerics(tmp_path, monkeypatch):
    """What the model chose is written down, and must be chosen again."""
    sweep, real = from_dict({"prompts": ["a"], **SMALL}), fe.load
    before = (run_sweep(sweep, tmp_path) / "sweep.json").read_text()
    by = json.loads(before)["environment"]
    assert by["dtype"] == "float32" and by["device"].startswith("cpu ") and by["autoencoder"] == "AutoEncoder"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("fluxedu.load", lambda *a, **k: real(*a, **{**k, "dtype": "bfloat16"}))
        with pytest.raises(SweepError, match=r"holds another sweep \(dtype differs\)"):
            run_sweep(sweep, tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        with pytest.raises(SweepError, match=r"holds another sweep \(device differs\)"):
            run_sweep(sweep, tmp_path)
    assert (run_sweep(sweep, tmp_path) / "sweep.json").read_text() == before
