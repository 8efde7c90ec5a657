"""What explorers and lenses of whole runs hold: less than the recorder's budget, and what they say stays the same."""

import numpy as np
import pytest
import torch

import fluxedu as fe
from fluxedu import widgets
from fluxedu.errors import BudgetError
from fluxedu.instruments import lenses, recorder
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.widgets.attention import evenly_spaced
from fluxedu.widgets.contributions import measure_contributions, split_contribution

PROMPT = "a red circle left of a blue square"
ASKED = {"steps": 6, "progress": False}
T, D = 32 + 4, 48  # tokens and width of the small pipeline, which has four blocks
EACH = 2 * T * D * 4  # queries and keys of a block and step


@pytest.fixture
def held(monkeypatch):
    """What every recorder held in the end, in bytes."""
    seen, leave = [], recorder.record.__exit__

    def left(self, *rest):
        seen.append(self.nbytes)
        return leave(self, *rest)

    monkeypatch.setattr(recorder.record, "__exit__", left)
    return seen


@pytest.fixture
def allow(monkeypatch):
    """``allow(bytes)``: the budget where none is said."""
    return lambda nbytes: monkeypatch.setattr(recorder, "BUDGET", nbytes)


@pytest.mark.parametrize(
    ("room", "blocks", "steps"),
    [(24, 4, 6), (23, 4, 5), (8, 4, 2), (7, 4, 1), (3, 3, 1), (2, 2, 1), (1, 1, 1)],
)
def test_attention_keeps_what_there_is_room_for(pipe, allow, held, room, blocks, steps):
    whole = widgets.attention(pipe, PROMPT, **ASKED)
    allow(EACH * room + 1)
    made = widgets.attention(pipe, PROMPT, **ASKED)
    assert held[-1] == EACH * blocks * steps <= recorder.BUDGET
    names, times = (made.control[name].labels for name in ("block", "step"))
    assert len(names) == blocks and len(times) == steps
    assert ("Recorded are" in made.view["text"]) == (room < 24)
    if room < 24:
        assert f"Recorded are {blocks} of 4 blocks and {steps} of 6 steps" in made.view["text"]
    place = {"head": 1, "patch": (1, 0), "word": "▁blue"}
    for name, time in ((names[0], times[-1]), (names[-1], times[0])):  # what is there is what a whole run says of it
        mine, theirs = (one.set(block=name, step=time, **place).current_view() for one in (made, whole))
        assert mine.text.partition(" Recorded are")[0] == theirs.text
        assert np.array_equal(mine.shades["word"], theirs.shades["word"])


def test_attention_of_two_questions_a_step_and_of_two_passes(pipe, plain_pipe, allow, held):
    allow(EACH * 16)
    widgets.attention(pipe, PROMPT, solver="midpoint", **ASKED)
    assert held[-1] == EACH * 4 * 2 * 2
    made = widgets.attention(plain_pipe, PROMPT, guidance=3.0, **ASKED)
    assert held[-1] == EACH * 4 * 4
    assert "4 of 6 steps" in made.view["text"]


def test_attention_keeps_what_was_asked_for_or_refuses(pipe, allow, held):
    allow(EACH * 8)
    made = widgets.attention(pipe, PROMPT, blocks="single.*", at_steps=[0, 1, 2, 5], **ASKED)
    assert held[-1] == EACH * 8 and "Recorded are" not in made.view["text"]
    for asked in ({"blocks": "*"}, {"blocks": "double.*"}, {"at_steps": slice(0, 3)}):
        with pytest.raises(BudgetError, match="name fewer sites, steps or heads"):
            widgets.attention(pipe, PROMPT, **asked, **ASKED)
    allow(EACH - 1)  # not even one block and step
    with pytest.raises(BudgetError):
        widgets.attention(pipe, PROMPT, **ASKED)


def test_evenly_spaced():
    assert [evenly_spaced(57, 1), evenly_spaced(5, 5), evenly_spaced(3, 9)] == [[28], [0, 1, 2, 3, 4], [0, 1, 2]]
    for count in (19, 50, 57):
        for most in range(1, count + 1):
            places = evenly_spaced(count, most)
            gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
            assert len(places) == most and 0 <= places[0] and places[-1] < count
            assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
            assert count // 2 in places or not most % 2


def rms(x):
    return x.float().square().mean(-1).sqrt()


def by_hand(pipe, rec):
    """Sizes, what is given and what is added, from whole streams, as they were found before they were reduced."""
    sizes, given, added = [], [], []
    for name in blocks_of(pipe):
        get = lambda site, name=name: rec[f"{name}.{site}"].tensor  # noqa: E731
        if name.startswith("double"):
            x, attention, mlp = (
                torch.cat([get(f"{s}{part}") for s in ("txt", "img")], dim=1)
                for part in ("", "_attn_contribution", "_mlp_contribution")
            )
            before, after = get("img"), get("img_out")
        else:
            block, gate = pipe.flux.single_blocks[int(name[-1])], get("gate")
            attention, mlp = split_contribution(block, get("heads"), get("mlp_hidden"), gate.view(len(gate), 1, -1))
            x, before, after = get("x"), get("x")[:, -4:], get("out")[:, -4:]
        sizes.append(rms(x))
        given.append(torch.stack([rms(v) for v in (attention, mlp, attention + mlp)]))
        added.append((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
    return torch.stack(sizes), torch.stack(given), torch.stack(added)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("how", [{}, {"solver": "midpoint"}, {"guidance": 3.0, "guidance_interval": (0.3, 1.0)}])
@torch.no_grad()
def test_sizes_are_kept_and_not_streams(make_pipe, allow, held, how, half):
    pipe = make_pipe(embedded="guidance" not in how)
    pipe = pipe.to(torch.bfloat16) if half else pipe
    with fe.record("double.*", "single.*", passes="prompted") as rec:
        pipe(PROMPT, **ASKED, **how)
    wanted, questions = by_hand(pipe, rec), 2 if "solver" in how else 1
    allow(4 * 6 * questions * T * 4 * 4)  # blocks, steps, questions, tokens, numbers, bytes: a twelfth of the streams'
    sizes, given, _ = measure_contributions(pipe, PROMPT, **ASKED, **how)
    added = lenses.contributions(pipe, PROMPT, **ASKED, **how)
    assert held[-2] == recorder.BUDGET and held[-1] <= 4 * 6 * questions * 4
    for found, right in zip((sizes, given, added), wanted, strict=True):
        assert torch.allclose(found.tensor.float(), right.float(), rtol=1e-5, atol=0)
    assert sizes.coords["step"] == given.coords["step"] == added.coords["step"] == rec["single.0.x"].coords["step"]
    with pytest.raises(BudgetError), fe.record("single.*.x"):  # of which the streams of two blocks alone are more
        pipe(PROMPT, **ASKED, **how)


def test_the_explorers_of_sizes_open(pipe, allow):
    allow(4 * 6 * T * 4 * 4)
    assert "attention adds" in widgets.contributions(pipe, PROMPT, **ASKED).view["text"]
    assert "attention adds" in widgets.streams(pipe, PROMPT, **ASKED).view["text"]


def test_the_bench_holds_a_step(pipe, allow):
    allow(4 * T * D * 4)
    assert "the latent changes by" in widgets.bench(pipe, PROMPT, PROMPT.replace("red", "green"), **ASKED).view["text"]


def test_the_map_of_the_model_shows_fewer_steps(pipe, allow, held):
    times = lambda made: made.control["step"].labels  # noqa: E731
    whole = times(widgets.architecture(pipe, PROMPT, **ASKED))
    assert len(whole) == 6
    sites = [site for site in fe.sites(pipe) if len(site.shape) > 2 and site.shape[-2] != 1]
    once = [site for site in sites if site.name.startswith(("t5.", "clip.", "ae."))]
    allow(4 * 256 * 640 * (2 * len(sites) - len(once)))
    assert times(widgets.architecture(pipe, PROMPT, **ASKED)) == [whole[0], whole[-1]]
    assert max(held[-2:]) < recorder.BUDGET
