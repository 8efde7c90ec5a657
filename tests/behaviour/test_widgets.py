"""Explorers as pure functions: what they show agrees with the run, computed in another way."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import comm
import numpy as np
import pytest
import torch
from IPython.core.completer import IPCompleter, provisionalcompleter
from matplotlib.text import Text

import fluxedu as fe
from fluxedu import widgets
from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.layers import modulation_channels
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import parts
from fluxedu.sampling.solvers import schedule
from fluxedu.widgets import explorer as explorer_module
from fluxedu.widgets import panels
from fluxedu.widgets.architecture import as_table, diagram
from fluxedu.widgets.explorer import Chips, Explorer, Slider, Try, View
from fluxedu.widgets.grid import shifted
from fluxedu.widgets.latents import edited
from fluxedu.widgets.panels import Lines, Pixels, Points
from fluxedu.widgets.velocity import plane

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def base():
    return fe.load("nano-base")


@pytest.fixture(scope="module")
def attention(pipe):
    return widgets.attention(pipe, PROMPT, steps=3, progress=False)


def panel(explorer, i):
    return explorer.current_view().panels[i]


# ---------------------------------------------------------------- registration


def test_an_explorer_is_a_module_that_can_be_called(pipe):
    module = importlib.import_module("fluxedu.widgets.trajectory")
    function = module.trajectory
    assert widgets.trajectory is module and inspect.ismodule(module) and inspect.isfunction(function)
    assert inspect.signature(widgets.trajectory) == inspect.signature(function)
    assert inspect.getdoc(widgets.trajectory) == inspect.getdoc(function)
    assert "trajectory" in dir(widgets) and module.trajectory_view
    assert widgets.trajectory(pipe, PROMPT, steps=1, progress=False).title == "How does an image emerge from noise?"


def test_arguments_complete_in_ipython():
    completer = IPCompleter(namespace={"widgets": widgets}, global_namespace={})
    with provisionalcompleter():
        for text, expected in (("widgets.traj", "trajectory"), ("widgets.solvers(eval", "evaluations=")):
            found = {completion.text.removeprefix(".") for completion in completer.completions(text, len(text))}
            assert expected in found


def test_every_module_registers_one_explorer_of_its_name():
    files = {path.stem for path in Path(widgets.__file__).parent.glob("*.py")} - {
        "__init__",
        "explorer",
        "panels",
        "reruns",
    }
    assert set(widgets.explorers()) == files and files <= set(widgets.__all__)
    with pytest.raises(AttributeError, match="has no explorer 'nothing'"):
        _ = widgets.nothing


def test_a_notebook_can_register_an_explorer(monkeypatch, small):
    monkeypatch.setattr("fluxedu.widgets.explorer.EXPLORERS", {})
    monkeypatch.setattr(widgets, "EXPLORERS", registered := explorer_module.EXPLORERS)

    @explorer_module.explorer(example=lambda pipe: mine())
    def mine():
        return small

    assert registered["mine"].example(None) is small and widgets.mine is mine and "mine" in dir(widgets)
    assert type(sys.modules[__name__]) is ModuleType  # only modules of the package become callable


# ---------------------------------------------------------------- colours


def test_colours_are_matplotlibs():
    import matplotlib

    values = torch.linspace(0, 4, 12).view(3, 4)
    expected = (matplotlib.colormaps["magma"](values.numpy() / 4)[..., :3] * 255).round()
    assert np.abs(panels.sequential(values).astype(int) - expected).max() <= 4  # one entry of the colour table
    white = panels.diverging(torch.tensor([[-2.0, 0.0, 2.0]]))[0].astype(int)
    assert white[1].min() > 240 and white[0, 2] > white[0, 0] and white[2, 0] > white[2, 2]  # blue, white, red


def test_an_overlay_leaves_the_image_where_weights_are_zero():
    image = np.full((8, 8, 3), 100, np.uint8)
    weights = np.zeros((2, 2))
    weights[1, 0] = 1
    laid = panels.overlay(image, weights)
    assert len({tuple(p) for p in laid[:4].reshape(-1, 3)}) == 1  # the upper half is all alike: the image, darkened
    assert tuple(laid[0, 0]) == (30, 30, 30)  # 30 % of 100
    assert (laid[4:, :4].astype(int) - laid[0, 0]).min(-1).max() != 0
    assert (laid[4:, 4:] == laid[0, 0]).all()


def test_the_key_of_an_overlay_has_the_colours_of_the_overlay(pipe):
    """A cell's weight, read off the key by its nearest colour, is right to 5 % of the scale on average."""
    picture = panels.to_rgb(pipe(PROMPT, steps=4, progress=False).images[0])
    shares = np.linspace(0, 1, 64).reshape(8, 8)
    laid = panels.overlay(picture, shares, 1.0)
    cells = laid.reshape(8, laid.shape[0] // 8, 8, -1, 3).mean((1, 3))
    key = np.array(
        [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in Pixels("t", laid, key=("0", "1")).message()["colours"]],
        float,
    )
    fine = np.array([np.interp(np.linspace(0, 8, 161), range(9), channel) for channel in key.T]).T
    read = np.linalg.norm(cells[:, :, None] - fine, axis=-1).argmin(-1) / 160
    assert np.abs(read - shares).max() < 0.15 and np.abs(read - shares).mean() < 0.05


def test_a_table_keeps_its_numbers_for_the_pointer():
    x = np.array([[0.0, 1.0], [2.0, 100.0]])
    shown = Pixels("t", panels.upscale(panels.sequential(x), 64), unit="share").message()
    assert np.frombuffer(shown["values"], "<f4").reshape(shown["table"]).tolist() == x.tolist()
    assert Pixels("t", np.zeros((4, 4, 3), np.uint8)).message()["values"] is None
    large = Pixels("t", panels.diverging(np.zeros((1000, 3)))).message()
    assert large["table"][0] <= panels.MAX_SIDE and large["table"][1] == 3


def test_one_large_row_does_not_flatten_the_others():
    x = np.array([[1.0, 2.0], [100.0, 200.0]])
    light = {scale: panels.sequential(x, scale=scale).astype(int).sum(-1) for scale in panels.SCALES}
    assert light["linear"][0].max() < 0.1 * light["linear"].max()
    assert light["log"][0].min() > 0.2 * light["log"].max()
    assert (light["row"][0] == light["row"][1]).all()
    assert "own colour scale" in Pixels("t", panels.sequential(x, scale="row")).message()["note"]
    with pytest.raises(InstrumentError, match="scale must be one of linear, log, row"):
        panels.sequential(x, scale="square")


# ---------------------------------------------------------------- each explorer against another way


def test_attention_shows_the_rows_and_columns_of_the_map(pipe, attention):
    with fe.record("single.1.attn.map", "double.0.attn.map") as rec:
        pipe(PROMPT, steps=3, progress=False)
    words = pipe.prompt_encoder.t5_tokenizer.length
    for block, step, head in (("single.1", 2, 3), ("double.0", 0, None)):
        reference = rec[f"{block}.attn.map"].tensor[step]  # [H, T, T]
        one = reference.mean(0) if head is None else reference[head]
        attention.set(
            block=block, step=step, head="mean of all heads" if head is None else head, patch=(2, 5), word="▁blue"
        )
        view = attention.current_view()
        row = one[words + 2 * 8 + 5]
        word_weights = row[: len(attention.control["word"].labels)]
        assert np.allclose(view.shades["word"], word_weights / word_weights.max(), atol=1e-5)
        column = one[words:, attention.values["word"]]
        peak = divmod(int(column.argmax()), 8)
        assert f"is in row {peak[0] + 1}, column {peak[1] + 1} (" in view.text
        assert view.text.startswith("The patch in row 3, column 6 gives ")
        given = [int(part) for part in re.findall(r"(\d+)% (?:of its attention to the image|to the)", view.text)]
        shares = [row[words:].sum(), word_weights.sum(), row[len(word_weights) : words].sum()]
        assert sum(given) == 100 and np.abs(np.array(given) - 100 * np.array(shares)).max() < 1
        assert view.panels[0].mark == (2, 5)


def test_attention_shows_the_prompted_pass(base):
    made = widgets.attention(base, PROMPT, blocks="single.2", steps=2, guidance=3.0, progress=False)
    with fe.record("single.2.attn.map", passes="prompted", tokens=["red"], reduce="head-mean") as rec:
        base(PROMPT, steps=2, guidance=3.0, progress=False)
    view = made.set(step=1, word="▁red").current_view()
    column = rec["single.2.attn.map"].tensor[1, :, 0]
    assert f"({float(column.max()):.1%} of its attention)" in view.text


def test_modulation_matches_the_sites(pipe):
    with fe.record("single.4.gate", "double.1.img_mod.scale2", steps=[0, 2]) as rec:
        out = pipe(PROMPT, steps=3, guidance=4.0, progress=False)
    times = out.trajectory.times[[0, 2]]
    table = modulation_channels(pipe, PROMPT, times=times, guidance=4.0)
    layers = table.coords["layer"]
    gate = table.tensor[:, layers.index("single.4"), 2]
    scale = table.tensor[:, layers.index("double.1.img_mlp"), 1]
    assert torch.allclose(gate, rec["single.4.gate"].tensor.view(2, -1), atol=1e-5)
    assert torch.allclose(scale, rec["double.1.img_mod.scale2"].tensor.view(2, -1), atol=1e-5)
    made = widgets.modulation(pipe, [PROMPT, "a letter K"], times=5)
    before = made.current_view().text
    assert made.set(guidance=10).current_view().text != before
    assert made.values["guidance"] == 9  # a number is a value, not an index, where the control has values
    assert made.set(kind="gate", cell=(3, 4)).current_view().panels[1].mark == 0.0  # the last of the times


def test_trajectory_ends_at_the_image(pipe):
    made = widgets.trajectory(pipe, PROMPT, steps=4, progress=False)
    out = pipe(PROMPT, steps=4, progress=False)
    made.set(step=3)
    last = panel(made, 1).image.astype(int)  # from the last step on, x0 is where Euler goes
    assert np.abs(last - np.asarray(out.images[0], int)).max() <= 1
    assert "t = 0.00" in made.view["text"]


def test_an_edit_is_where_it_was_made(pipe):
    latent = torch.zeros(3, 5, 6)
    assert edited(latent, 1, (0, 5), 0, 2.0).nonzero().tolist() == [[1, 0, 5]]
    assert edited(latent, 1, (0, 5), 1, 2.0)[1].sum() == 2.0 * 4  # a corner has four cells around it
    assert edited(latent, 2, (3, 3), 2, -1.0)[2].eq(-1).all()
    made = widgets.latents(pipe, PROMPT, steps=4, progress=False)
    made.set(amount="+0")
    drawn = panels.to_rgb(pipe(PROMPT, steps=4, progress=False).images[0]).astype(int)
    assert np.array_equal(panel(made, 1).image, panel(made, 2).image)
    # decoded beside others, where a sum may round the other way: a level of 255
    assert np.abs(panel(made, 1).image - drawn).max() <= 1
    assert ": 0% of the pixels" in made.view["text"]
    made.set(amount=4.0, cell=(0, 0), channel=2)
    changed = panel(made, 3).image.astype(int).max(-1) > 12  # more than the darkest few of the colours
    assert changed[:40, :40].any() and not changed[88:, 88:].any()


def test_latents_take_an_image(pipe):
    image = pipe(PROMPT, steps=2, progress=False).images[0].convert("L")
    assert "channel " in widgets.latents(pipe, image).view["text"]


def test_particles_go_where_their_arrows_point(pipe):
    made = widgets.velocity(pipe, [PROMPT, "a letter K"], seeds=2, steps=4, progress=False)
    times = [float(label.split()[-1]) for label in made.control["step"].labels]
    views = [made.set(step=i).current_view().panels[0] for i in range(5)]
    exact = schedule(4, 64, ends=pipe.defaults.shift_ends).tolist()
    assert np.allclose(times, exact, atol=0.006)
    for i in range(4):
        went = views[i + 1].xy - views[i].xy
        share = (exact[i] - exact[i + 1]) / (0.2 * exact[i])
        assert np.allclose(went, views[i].arrows * share, atol=2e-3)
    ends = views[-1].xy[:, 0]
    assert ends[:2].mean() < ends[2:].mean()  # the first direction leads from the one prompt to the other
    assert views[0].group == [0, 0, 1, 1]
    assert np.allclose(views[0].xy[0] - views[0].xy[1], views[0].xy[2] - views[0].xy[3], atol=1e-3)  # the same noises
    with pytest.raises(InstrumentError, match="particle must be an index into 4"):
        made.set(particle=4)


def test_a_plane_has_two_directions_at_right_angles():
    g = torch.Generator().manual_seed(0)
    for group in ([0] * 6, [0, 0, 0, 1, 1, 1], [0], [0, 1]):
        _, axes = plane(torch.randn(len(group), 50, generator=g), group)
        assert torch.allclose(axes @ axes.T, torch.eye(2), atol=1e-5)


def test_the_grid_shows_what_the_pipeline_draws(pipe):
    made = widgets.grid(
        pipe, PROMPT, steps=(3, 1), guidance_scales=(2.0, 6.0), shifts=(1.0, 5.0), seed=2, progress=False
    )
    made.set(shift=5.0, cell=(1, 0))
    other = shifted(pipe, 5.0)
    out = other(PROMPT, steps=3, guidance=2.0, seed=2, progress=False)
    assert np.array_equal(panel(made, 1).image, np.asarray(out.images[0]))
    even = torch.linspace(1, 0, 4)
    assert torch.allclose(out.trajectory.times, 5 * even / (1 + 4 * even))
    assert "differs by 0% of its norm" in made.view["text"]  # from itself
    assert panel(made, 0).rows == ["1", "3"] and panel(made, 0).columns == ["2", "6"]
    assert pipe.defaults.shift_ends != other.defaults.shift_ends  # ours is as it was
    rows = [[np.full((4, 4, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    assert panels.contact_sheet(rows)[::2, ::2, 0].tolist() == [[0, 1, 2], [10, 11, 12]]
    with pytest.raises(InstrumentError, match="shift must be above 0"):
        widgets.grid(pipe, PROMPT, shifts=(0.0,))


def test_heads_are_removed_as_by_ablate(pipe):
    made = widgets.heads(pipe, PROMPT, steps=1, batch=1, progress=False)  # equal to the last bit only one by one
    reference = pipe(PROMPT, steps=1, progress=False)
    cuts = {"this head": ([3], "head 3 of"), "all other heads of its block": ([0, 1, 2, 4], "all heads of")}
    for removed, (lost, named) in cuts.items():
        view = made.set(removed=removed, cell=(4, 3)).current_view()
        with fe.ablate("single.2.heads", heads=lost):
            other = pipe(PROMPT, steps=1, progress=False)
        assert np.array_equal(view.panels[2].image, np.asarray(other.images[0]))
        far = float((other.latents - reference.latents).norm() / reference.latents.norm())
        assert (
            view.text.startswith(f"Without {named} block single 2") and f" the latent changes by {far:.0%}" in view.text
        )


# ---------------------------------------------------------------- the map of the model


def test_every_site_belongs_to_one_part(pipe):
    those = parts(pipe)
    for site in fe.sites(pipe):
        assert sum(part.has(site.name) for part in those) == 1, site.name
    boxes, lines, (width, height) = diagram(those)
    assert len(boxes) == len(those)
    assert all(0 <= x and x + w <= width and y + h <= height for _, x, y, w, h, _ in boxes)


def test_the_diagram_holds_a_large_model(pipe):
    class Large:
        flux = type("flux", (), {"config": fe.models.FluxConfig.variant("dev")})
        networks = pipe.networks

    boxes, _, (width, height) = diagram(parts(Large))
    assert len(boxes) == 19 + 38 + 9
    assert all(x + w <= width and y + h <= height for _, x, y, w, h, _ in boxes)


def test_the_map_shows_every_site(pipe):
    made = widgets.architecture(pipe, PROMPT, steps=3, progress=False)
    empty = set()
    for site in fe.sites(pipe):
        shown = made.set(box=site.name).current_view().panels[0]
        if shown.value is None:
            empty.add(site.name)
            assert shown.text.endswith("This run has no value here.")
        else:
            assert ("Here a token receives" if site.name.endswith(".map") else "Here: mean") in shown.text
    # no picture to begin with, and no classifier-free guidance
    assert {name for name in empty if not name.startswith("ae.encoder.")} == {
        "ae.latent",
        "sample.negative",
        "sample.prompted",
    }
    with pytest.raises(InstrumentError, match=r"not 'single.0.attn.mpa'. Similar names: single.0.attn.map"):
        made.set(box="single.0.attn.mpa")


def test_the_map_begins_with_the_image_and_keeps_shapes(pipe):
    made = widgets.architecture(pipe, PROMPT, steps=2, height=96, width=160, progress=False)
    out = pipe(PROMPT, steps=2, height=96, width=160, progress=False)
    shown = made.current_view().panels[0]
    assert shown.ids[shown.mark] == "sample.image"
    assert np.array_equal(shown.value.image, np.asarray(out.images[0]))
    for name, tiles in (("sample.x", (4, 4)), ("sample.velocity", (4, 4))):
        height, width = made.set(box=name).current_view().panels[0].value.image.shape[:2]
        assert height / width == (tiles[0] * 96) / (tiles[1] * 160)


def test_the_map_under_guidance_and_other_solvers(base, pipe):
    """With two passes every site shows its value of the prompted one; with heun, of the step's first evaluation."""
    made = widgets.architecture(base, PROMPT, steps=2, guidance=3.0, progress=False)
    with fe.record("single.2.x", "clip.pooled", passes="prompted") as rec:
        base(PROMPT, steps=2, guidance=3.0, progress=False)
    for site in fe.sites(base):
        assert "cannot be shown" not in made.set(box=site.name).view["text"]
    for step in (0, 1):
        made.set(step=step, box="single.2.x")
        assert f"mean {float(rec['single.2.x'].tensor[step].mean()):.3g}," in made.view["text"]
    with fe.record("single.2.x") as rec:
        pipe(PROMPT, steps=3, solver="heun", progress=False)
    made = widgets.architecture(pipe, PROMPT, steps=3, solver="heun", progress=False)
    values = rec["single.2.x"]
    for step, time in enumerate(dict.fromkeys(values.coords["step"][::2])):
        made.set(step=step, box="single.2.x")
        first = values.coords["step"].index(time)
        assert f"mean {float(values.tensor[first].mean()):.3g}," in made.view["text"]


def test_pictures_keep_their_shape(pipe):
    options = {"height": 96, "width": 160, "steps": 2, "progress": False}
    attention, latent = widgets.attention(pipe, PROMPT, **options), widgets.latents(pipe, PROMPT, **options)
    trajectory = widgets.trajectory(pipe, PROMPT, **options)
    for shown in (panel(attention, 0), panel(latent, 0), panel(latent, 2), panel(trajectory, 2)):
        assert shown.image.shape[0] / shown.image.shape[1] == 96 / 160
    assert panel(attention, 0).cells == (6, 10)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: widgets.attention(p, PROMPT, steps=2, at_steps=[99]), "the run has no such step"),
        (lambda p: widgets.architecture(p, PROMPT, steps=2, at_steps=[99]), "the run has no such step"),
        (lambda p: widgets.attention(p, PROMPT, seed=[1, 2]), "give one seed"),
        (lambda p: widgets.trajectory(p, PROMPT, seed=[1, 2]), "give one seed"),
        (lambda p: widgets.velocity(p, PROMPT, seed=3), "seed is set by the explorer itself"),
        (lambda p: widgets.velocity(p, [PROMPT, PROMPT]), "the prompts must be different"),
        (lambda p: widgets.velocity(p, 3), "prompts must be of the type str . Sequence.str., not 3"),
        (lambda p: widgets.grid(p, PROMPT, guidance=9.0), "guidance is set by the explorer itself"),
        (lambda p: widgets.grid(p, PROMPT, shifts=(float("inf"),)), "shifts must be a number"),
        (lambda p: widgets.modulation(p, PROMPT, times=0), "times must be a whole number from 2"),
        (lambda p: widgets.heads(p, PROMPT, seed=[0, 3]), "give one seed"),
    ],
)
def test_invalid_arguments_are_refused_at_once(pipe, make, says):
    with pytest.raises(InstrumentError, match=says):
        make(pipe)


def test_few_steps_and_few_pictures(pipe):
    assert len(widgets.trajectory(pipe, PROMPT, steps=1, progress=False).current_view().panels) == 3
    made = widgets.velocity(pipe, ["a red circle", "a blue square"], seeds=1, steps=1, progress=False)
    assert np.isfinite(panel(made, 0).xy).all()


def test_a_value_as_a_table():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()
    table = as_table(Named(x, ("batch", "head", "token", "channel")))
    assert torch.equal(table.tensor, torch.cat(list(x[1]), dim=1))  # the prompted pass, heads beside each other
    tiles = as_table(Named(torch.arange(5).view(1, 5, 1, 1).expand(1, 5, 2, 2), ("batch", "channel", "row", "column")))
    assert tiles.tensor[::2, ::2].tolist() == [[0, 1], [2, 3], [4, 0]]
    large = as_table(Named(torch.zeros(1, 4608, 3072), ("batch", "token", "channel")))
    assert large.shape[0] <= 256 and large.shape[1] <= 640
    assert as_table(Named(torch.zeros(1, 7), ("batch", "channel"))).shape == (1, 7)


# ---------------------------------------------------------------- the wiring


def drawing(step, word, cell):
    if cell == (9, 9):
        raise InstrumentError("there is no such cell.")
    image = np.full((4, 4, 3), 10 * step + word, np.uint8)
    return View([Pixels("p", image, (10, 10), cell, pointer="cell")], f"{step} {word} {cell}", {"word": [0, 0.5, 2]})


@pytest.fixture
def small():
    controls = [Slider("step", "step", ["first", "second"]), Chips("word", "word", ["a", "b", "c"], 1)]
    return Explorer("Small", controls, drawing, {"cell": (0, 0)})


def test_a_move_in_the_page_changes_the_view(small):
    assert small.view["text"] == "0 1 (0, 0)"
    small.state = {"step": 1, "word": 2, "cell": [3, 4], "moves": 7}  # as the browser sends it
    assert small.view["text"] == "1 2 (3, 4)"
    assert small.view["moves"] == 7
    assert small.view["panels"][0]["data"] == bytes([12] * 48)
    assert small.view["shades"] == {"word": [0.0, 0.5, 1.0]}


def test_any_error_is_answered(small):
    """A page that is not answered would wait for ever."""
    small.draw = lambda **state: 1 / 0
    small.state = small.state | {"step": 1, "moves": 5}
    assert small.view["text"] == "This cannot be shown: ZeroDivisionError, division by zero."
    assert small.view["moves"] == 5
    small.state = {"step": "x", "moves": 6}
    assert small.view["moves"] == 6


def test_an_invalid_move_is_reported_and_the_page_goes_on(small):
    data = small.view["panels"]
    small.state = small.state | {"cell": [9, 9], "moves": 3}
    assert small.view["text"] == "there is no such cell."
    assert small.view["panels"] == data and small.view["moves"] == 3
    small.state = small.state | {"cell": [1, 1], "moves": 4}
    assert small.view["text"] == "0 1 (1, 1)"


@pytest.mark.parametrize(
    "moves, message",
    [
        ({"step": 2}, "step must be one of 2 options (first, second), not 2."),
        ({"step": "third"}, "step must be one of 2 options (first, second), not 'third'."),
        ({"word": 1.5}, "word must be one of 3 options (a, b, c), not 1.5."),
        ({"speed": 1}, "this explorer has step, word, cell, but no 'speed'."),
        ({"cell": (9, 9)}, "there is no such cell."),
        ({"cell": (10, 0)}, "cell must be an index into 10 x 10, counted from 0, not (10, 0)."),
        ({"cell": (-1, 0)}, "cell must be an index into 10 x 10, counted from 0, not (-1, 0)."),
        ({"cell": 5}, "cell must be an index into 10 x 10, counted from 0, not 5."),
    ],
)
def test_moves_by_hand_are_checked(small, moves, message):
    before = small.state
    with pytest.raises(InstrumentError, match=re.escape(message)):
        small.set(**moves)
    assert small.state == before


def test_moves_by_hand(small):
    assert small.set(step="second", word=-1).view["text"] == "1 2 (0, 0)"
    assert repr(small) == "<Explorer: Small>"  # no address, so that outputs can be compared


def test_suggestions_are_checked_when_the_explorer_is_made():
    controls = [Slider("step", "step", ["first", "second"]), Chips("word", "word", ["a", "b", "c"], 1)]
    options = {"instruction": "Point at a cell.", "play": "step"}
    made = Explorer("Q?", controls, drawing, {"cell": (0, 0)}, tries=[Try("b?", step="second", cell=(1, 2))], **options)
    assert made.tries == [{"label": "b?", "moves": {"step": 1, "cell": (1, 2)}}]
    assert made.first == {"step": 0, "word": 1, "cell": (0, 0)} and made.play == "step"
    for wrong, says in [
        ({"tries": [Try("x", speed=1)]}, "this explorer has step, word, cell, but no 'speed'."),
        ({"tries": [Try("x", step="third")]}, "step must be one of 2 options (first, second), not 'third'."),
        ({"tries": [Try("x", cell=(10, 0))]}, "cell must be an index into 10 x 10, counted from 0, not (10, 0)."),
        ({"play": "speed"}, "play must be the name of a control or of a pair (step, word, cell), not 'speed'."),
    ]:
        with pytest.raises(InstrumentError, match=re.escape(says)):
            Explorer("Q?", controls, drawing, {"cell": (0, 0)}, **wrong)


def test_the_first_view_is_in_the_first_message():
    """A page on a slow machine would lose a view that comes in a second message."""
    sent = []

    class Comm(comm.base_comm.BaseComm):
        def publish_msg(self, kind, data=None, metadata=None, buffers=None, **keys):
            sent.append((kind, data, buffers))

    made, kept = None, comm.create_comm
    comm.create_comm = Comm
    try:
        slider = Slider("step", "step", ["first", "second"])
        made = Explorer("Q?", [slider], lambda step, cell: drawing(step, 0, cell), {"cell": (0, 0)})
        made.set(step=1)._repr_mimebundle_()
    finally:
        comm.create_comm = kept
    assert made.view["text"] == "1 0 (0, 0)"
    assert {kind for kind, _, _ in sent} == {"comm_open"}  # of the layout and of the explorer
    assert sent[-1][1]["state"]["view"]["text"] == "1 0 (0, 0)" and sent[-1][2] == [bytes([10] * 48)]


def test_every_explorer_has_a_static_figure(pipe, attention, small):
    one = widgets.velocity(pipe, PROMPT, seeds=2, steps=2, progress=False)
    for explorer in (attention, small, one, widgets.modulation(pipe, PROMPT)):
        figure = explorer.figure()
        figure.canvas.draw()
        titles = [" ".join(ax.get_title().split()) for part in figure.subfigs for ax in part.axes]
        assert all(p.title in titles for p in explorer.current_view().panels)
        assert figure.get_supxlabel().replace("\n", " ") == explorer.view["text"]
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(sizes) * 80 / 72 >= 11  # px, at the 80 dots per inch of a notebook
        assert figure.get_figwidth() * 80 <= 736  # as wide as a page of the documentation


def test_a_cell_shows_the_static_figure_and_then_the_widget(small, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append(bundle))
    small._ipython_display_()
    assert f'class="fluxedu-still {small.still}"' in shown[0]["text/html"]
    assert 'alt="Small 0 1 (0, 0)"' in shown[0]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown[1]


def test_panels_are_few_bytes_and_plain(attention):
    for shown in attention.view["panels"]:
        assert len(shown["data"]) == shown["width"] * shown["height"] * 3 <= 256 * 256 * 3
    lines = Lines("l", [1.0, 0.0], {"a": [1 / 3, 2.0]}, mark=0.5).message()
    assert lines["series"] == [{"name": "a", "y": [0.3333, 2.0], "unit": ""}]
    points = Points("p", np.array([[1.0, 2.0]]), np.zeros((1, 2)), [0], ["g"], (1.0, 1.0)).message()
    assert points["xy"] == [1.0, 2.0]


def test_the_front_end_fetches_nothing():
    front = Path(widgets.__file__).parent
    text = (front / "static" / "explorer.js").read_text() + (front / "static" / "explorer.css").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\bimport\b|fetch\(|@import|url\((?!#)", text)
