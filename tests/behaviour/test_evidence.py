"""The stored results behind the course's claims: intervals against scipy, enough samples, and a part computed again."""

import json
from importlib import import_module

import numpy as np
import pytest
from scipy.stats import binomtest

import fluxedu as fe
from evidence.intervals import difference, median, share
from evidence.scenes import roles, two_shapes
from fluxedu.course import evidence
from fluxedu.errors import CourseError


@pytest.mark.parametrize(("hits", "count"), [(0, 8), (3, 8), (34, 40), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(hits, count):
    entry = share([True] * hits + [False] * (count - hits))
    expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert [entry["low"], entry["high"]] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert (entry["value"], entry["n"], entry["hits"].count("1")) == (hits / count, count, hits)


def test_the_intervals_of_medians_and_differences_cover_the_truth():
    """In about 95 of 100 repetitions; fewer than 85 happen once in 10,000 times."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(100):
        values, others = rng.normal(3, 1, 40), rng.normal(1, 1, 40)
        for i, (entry, truth) in enumerate(((median(values), 3), (difference(values, others), 2))):
            covered[i] += entry["low"] <= truth <= entry["high"]
    assert (covered >= 85).all() and (covered < 100).any()


def test_roles_find_the_tokens_of_each_part():
    tokenizer = fe.load().prompt_encoder.t5_tokenizer
    for scene in two_shapes(20):
        pieces, found = tokenizer.pieces(scene.prompt), roles(tokenizer, scene)
        words = {
            part: "".join(pieces[token] for token in tokens) for part, tokens in found.items() if part != "padding"
        }
        assert words.pop("end token") == "</s>"
        expected = (*scene.colors, *scene.forms, scene.relation.replace(" ", ""))
        names = ("first colour", "second colour", "first noun", "second noun", "relation")
        assert tuple(words[name].replace("▁", "") for name in names) == expected
        assert sorted(sum(found.values(), [])) == list(range(tokenizer.length))


def entries(table: dict):
    """Every entry with an interval in a table."""
    for value in table.values():
        if isinstance(value, dict):
            yield from [value] if "low" in value else entries(value)


@pytest.mark.parametrize("name", evidence.names())
def test_results_say_how_they_were_made_and_rest_on_enough_samples(name):
    about = json.loads((evidence.FOLDER / f"{name}.json").read_text())["about"]
    assert about["command"] == f"python -m evidence {name}" and set(about["versions"]) == {"fluxedu", "torch", "python"}
    found = list(entries(evidence.load(name)))
    assert found
    for entry in found:
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] >= 10, "too few samples"


def test_the_first_samples_computed_again_are_the_stored_ones():
    """Of activation patching, which reads all kinds of values from a run and replaces them."""
    stored, again = evidence.load("patching"), import_module("evidence.patching").run(1)
    pairs = list(zip(entries(stored), entries(again), strict=True))
    assert len(pairs) == 1 + 8 + 8 * 2
    assert [old["hits"][:1] for old, _ in pairs] == [new["hits"] for _, new in pairs]


def test_runs_of_flux2_are_compared_with_the_twin_and_with_their_own_recipe(tmp_path, monkeypatch):
    """Ten prompts with one claim each: 9 right by flux2, 5 by the twin, 7 by flux2 from another seed."""
    for name, right in {"twin": 5, "flux2": 9, "flux2@89": 7}.items():
        rows = {"everything": [[int(i < right), 1] for i in range(10)], "letter": [[0, 0]] * 10}
        (tmp_path / name).mkdir()
        figures = {"parameters": 1, "steps": 2, "batch": 3, "rows": rows}
        (tmp_path / name / "exam.json").write_text(json.dumps(figures))
    module = import_module("evidence.flux2")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    table = module.run()
    assert list(table["runs"]) == ["twin", "flux2"] and "minus twin" not in table["runs"]["twin"]
    assert table["runs"]["flux2"]["right"]["everything"]["value"] == 0.9
    minus = table["runs"]["flux2"]["minus twin"]["everything"]
    assert (
        minus["value"] == pytest.approx(0.4) and minus["low"] == pytest.approx(0.1) and table["runs"]["flux2"]["paired"]
    )
    assert table["seeds"]["flux2@89"]["minus flux2"]["everything"]["value"] == pytest.approx(-0.2)
    (tmp_path / "twin" / "exam.json").unlink()  # then its stored sums are compared: 39 % of 500 prompts
    table = module.run()
    assert table["runs"]["twin"]["right"]["everything"]["value"] == 0.39 and not table["runs"]["flux2"]["paired"]


def test_an_unknown_name_lists_the_names():
    with pytest.raises(CourseError, match="name must be one of .*patching.*, not 'nothing'"):
        evidence.load("nothing")
