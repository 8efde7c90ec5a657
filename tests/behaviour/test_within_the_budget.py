"""Explorers and lenses of whole runs hold less than the recorder's budget, with the same results."""

from itertools import pairwise

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
OPTIONS = {"steps": 6, "progress": False}
T, D = 32 + 4, 48  # tokens and width of the small pipeline, which has 4 blocks
QK_BYTES = 2 * T * D * 4  # queries and keys of one block and step


@pytest.fixture
def held_bytes(monkeypatch):
    """The bytes that each recorder held when it was left, in order."""
    nbytes, leave = [], recorder.record.__exit__

    def note_and_leave(self, *rest):
        nbytes.append(self.nbytes)
        return leave(self, *rest)

    monkeypatch.setattr(recorder.record, "__exit__", note_and_leave)
    return nbytes


@pytest.fixture
def set_budget(monkeypatch):
    """``set_budget(nbytes)`` sets the default budget."""
    return lambda nbytes: monkeypatch.setattr(recorder, "BUDGET", nbytes)


@pytest.mark.parametrize(
    ("budget", "blocks", "steps"),
    [(24, 4, 6), (23, 4, 5), (8, 4, 2), (7, 4, 1), (3, 3, 1), (2, 2, 1), (1, 1, 1)],
)
def test_attention_records_what_fits_in_the_budget(pipe, set_budget, held_bytes, budget, blocks, steps):
    full = widgets.attention(pipe, PROMPT, **OPTIONS)
    set_budget(QK_BYTES * budget + 1)
    explorer = widgets.attention(pipe, PROMPT, **OPTIONS)
    assert held_bytes[-1] == QK_BYTES * blocks * steps <= recorder.BUDGET
    names, times = (explorer.control[name].labels for name in ("block", "step"))
    assert len(names) == blocks and len(times) == steps
    assert ("steps were recorded" in explorer.view["text"]) == (budget < 24)
    if budget < 24:
        assert f" {blocks} of 4 blocks and {steps} of 6 steps were recorded" in explorer.view["text"]
    for name, time in ((names[0], times[-1]), (names[-1], times[0])):  # the same as in a complete recording
        choice = {"block": name, "step": time, "head": 1, "patch": (1, 0), "word": "▁blue"}
        view, expected = explorer.set(**choice).current_view(), full.set(**choice).current_view()
        assert view.text.partition(f" {blocks} of 4 blocks and ")[0] == expected.text
        assert np.array_equal(view.shades["word"], expected.shades["word"])


def test_attention_with_two_evaluations_per_step_and_with_two_passes(pipe, plain_pipe, set_budget, held_bytes):
    set_budget(QK_BYTES * 16)
    widgets.attention(pipe, PROMPT, solver="midpoint", **OPTIONS)
    assert held_bytes[-1] == QK_BYTES * 4 * 2 * 2
    explorer = widgets.attention(plain_pipe, PROMPT, guidance=3.0, **OPTIONS)
    assert held_bytes[-1] == QK_BYTES * 4 * 4
    assert "4 of 6 steps" in explorer.view["text"]


def test_attention_records_the_chosen_blocks_and_steps_or_refuses(pipe, set_budget, held_bytes):
    set_budget(QK_BYTES * 8)
    explorer = widgets.attention(pipe, PROMPT, blocks="single.*", at_steps=[0, 1, 2, 5], **OPTIONS)
    assert held_bytes[-1] == QK_BYTES * 8 and "steps were recorded" not in explorer.view["text"]
    for chosen in ({"blocks": "*"}, {"blocks": "double.*"}, {"at_steps": slice(0, 3)}):
        with pytest.raises(BudgetError, match="record fewer sites, steps or heads"):
            widgets.attention(pipe, PROMPT, **chosen, **OPTIONS)
    set_budget(QK_BYTES - 1)  # less than one block and step
    with pytest.raises(BudgetError):
        widgets.attention(pipe, PROMPT, **OPTIONS)


def test_evenly_spaced():
    assert [evenly_spaced(57, 1), evenly_spaced(5, 5), evenly_spaced(3, 9)] == [[28], [0, 1, 2, 3, 4], [0, 1, 2]]
    for count in (19, 50, 57):
        for most in range(1, count + 1):
            indices = evenly_spaced(count, most)
            gaps = {b - a for a, b in pairwise(indices)}
            assert len(indices) == most and 0 <= indices[0] and indices[-1] < count
            assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
            assert count // 2 in indices or not most % 2


def rms(x):
    return x.float().square().mean(-1).sqrt()


def by_hand(pipe, rec):
    """Sizes of tokens, of what is added to them, and relative changes, from complete recordings."""
    sizes, added_sizes, changes = [], [], []
    for name in blocks_of(pipe):
        if name.startswith("double"):
            x, attention, mlp = (
                torch.cat([rec[f"{name}.txt{site}"].tensor, rec[f"{name}.img{site}"].tensor], dim=1)
                for site in ("", "_attn_contribution", "_mlp_contribution")
            )
            before, after = rec[f"{name}.img"].tensor, rec[f"{name}.img_out"].tensor
        else:
            heads, hidden, gate = (rec[f"{name}.{site}"].tensor for site in ("heads", "mlp_hidden", "gate"))
            block = pipe.flux.single_blocks[int(name[-1])]
            attention, mlp = split_contribution(block, heads, hidden, gate.view(len(gate), 1, -1))
            x = rec[f"{name}.x"].tensor
            before, after = x[:, -4:], rec[f"{name}.out"].tensor[:, -4:]
        sizes.append(rms(x))
        added_sizes.append(torch.stack([rms(v) for v in (attention, mlp, attention + mlp)]))
        changes.append((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
    return torch.stack(sizes), torch.stack(added_sizes), torch.stack(changes)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [{}, {"solver": "midpoint"}, {"guidance": 3.0, "guidance_interval": (0.3, 1.0)}])
@torch.no_grad()
def test_sizes_are_recorded_and_not_streams(make_pipe, set_budget, held_bytes, options, half):
    pipe = make_pipe(embedded="guidance" not in options)
    pipe = pipe.to(torch.bfloat16) if half else pipe
    with fe.record("double.*", "single.*", passes="prompted") as rec:
        pipe(PROMPT, **OPTIONS, **options)
    expected, evaluations = by_hand(pipe, rec), 2 if "solver" in options else 1
    # blocks, steps, evaluations, tokens, numbers, bytes: a twelfth of the streams
    set_budget(4 * 6 * evaluations * T * 4 * 4)
    sizes, added_sizes, _ = measure_contributions(pipe, PROMPT, **OPTIONS, **options)
    changes = lenses.contributions(pipe, PROMPT, **OPTIONS, **options)
    assert held_bytes[-2] == recorder.BUDGET and held_bytes[-1] <= 4 * 6 * evaluations * 4
    for found, value in zip((sizes, added_sizes, changes), expected, strict=True):
        assert torch.allclose(found.tensor.float(), value.float(), rtol=1e-5, atol=0)
    for found in (sizes, added_sizes, changes):
        assert found.coords["step"] == rec["single.0.x"].coords["step"]
    with pytest.raises(BudgetError), fe.record("single.*.x"):  # two of the streams alone exceed it
        pipe(PROMPT, **OPTIONS, **options)


def test_the_explorers_of_sizes_open(pipe, set_budget):
    set_budget(4 * 6 * T * 4 * 4)
    assert "attention adds" in widgets.contributions(pipe, PROMPT, **OPTIONS).view["text"]
    assert "attention adds" in widgets.streams(pipe, PROMPT, **OPTIONS).view["text"]


def test_the_bench_holds_one_step(pipe, set_budget):
    set_budget(4 * T * D * 4)
    explorer = widgets.bench(pipe, PROMPT, PROMPT.replace("red", "green"), **OPTIONS)
    assert "the latent changes by" in explorer.view["text"]


def test_the_architecture_explorer_shows_fewer_steps(pipe, set_budget, held_bytes):
    full = widgets.architecture(pipe, PROMPT, **OPTIONS).control["step"].labels
    assert len(full) == 6
    sites = [site for site in fe.sites(pipe) if len(site.shape) > 2 and site.shape[-2] != 1]
    outside_steps = [site for site in sites if site.name.startswith(("t5.", "clip.", "ae."))]
    set_budget(4 * 256 * 640 * (2 * len(sites) - len(outside_steps)))
    assert widgets.architecture(pipe, PROMPT, **OPTIONS).control["step"].labels == [full[0], full[-1]]
    assert max(held_bytes[-2:]) < recorder.BUDGET
