"""Plots: figures show the values they are given."""

from base64 import b64decode
from io import BytesIO

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from nbclient import NotebookClient
from PIL import Image

from fluxedu import plots
from fluxedu.errors import InstrumentError
from fluxedu.instruments.named import Named
from fluxedu.plots import count_parameters, radial_power

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
g = torch.Generator().manual_seed(0)


def named(*axes, **sizes):
    return Named(torch.rand(*(sizes[a] for a in axes), generator=g), axes)


MAPS = named("block", "word", "row", "column", block=3, word=2, row=2, column=3)
HEADS = named("block", "head", "row", "column", block=3, head=4, row=2, column=3)
ADDED = named("block", "step", block=4, step=5)
SIZES = named("time", "layer", "kind", time=5, layer=6, kind=3)
FIELD = named("up", "across", "what", up=3, across=3, what=4)
NET = torch.nn.Sequential(torch.nn.Linear(30, 10), torch.nn.Linear(10, 3))
ALL = {
    "word_maps": lambda: plots.word_maps(MAPS, PICTURE),
    "head_gallery": lambda: plots.head_gallery(HEADS, PICTURE),
    "head_gallery alone": lambda: plots.head_gallery(HEADS),
    "overlay": lambda: plots.overlay(PICTURE, MAPS.tensor[0, 0], "red"),
    "contributions": lambda: plots.contributions(ADDED),
    "modulation": lambda: plots.modulation(SIZES),
    "film_strip": lambda: plots.film_strip({"x": [PICTURE] * 20, "x0": [PICTURE] * 20}, np.linspace(1, 0.05, 20)),
    "side_by_side": lambda: plots.side_by_side(PICTURE, PICTURE),
    "treemap": lambda: plots.treemap(NET),
    "spectrum": lambda: plots.spectrum({"noise": torch.randn(1, 16, 16, 16, generator=g)}),
    "quiver": lambda: plots.quiver(FIELD),
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_can_be_saved_and_opens_no_window(name, tmp_path):
    before = matplotlib.get_backend()
    figure = ALL[name]()
    figure.savefig(tmp_path / "plot.png", dpi=60)
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 5
    assert matplotlib.get_backend() == before


def test_a_notebook_shows_a_figure_once_with_and_without_pyplot():
    """The value of a cell, in a kernel: one image, and beside it the same text as before."""
    drawn = "import numpy as np\nfrom fluxedu import plots\nplots.spectrum({'noise': np.eye(16).reshape(1, 4, 8, 8)})"
    pyplot = "import sys\nprint('matplotlib.pyplot' in sys.modules)\nimport matplotlib.pyplot as plt"
    cells = [drawn, pyplot, drawn, "%matplotlib inline", drawn, "plt.figure(figsize=(1, 1))\n" + drawn]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[1][0].text == "False\n"  # nothing had imported it
    for found in (outputs[0], outputs[2], outputs[4]):
        assert [output.output_type for output in found] == ["execute_result"]
        assert set(found[0].data) == {"image/png", "text/plain"}
        assert found[0].data["text/plain"] == "<Figure size 500x340 with 1 Axes>"
    assert [output.output_type for output in outputs[5]] == ["execute_result", "display_data"]  # and the user's own
    assert np.asarray(Image.open(BytesIO(b64decode(outputs[0][0].data["image/png"])))).std() > 5


def images(figure):
    return [np.ma.getdata(im.get_array()) for ax in figure.axes for im in ax.images]


def test_maps_are_drawn_as_they_are():
    drawn = images(plots.head_gallery(HEADS))
    assert np.allclose(drawn, HEADS.tensor.flatten(0, 1).numpy())
    assert np.allclose(images(plots.contributions(ADDED))[0], ADDED.tensor.numpy())
    assert np.allclose(images(plots.modulation(SIZES))[2], SIZES.tensor[..., 2].T.numpy())
    assert len(plots.word_maps(MAPS, PICTURE).axes) == 2 * (3 + 1)


def test_a_film_strip_shows_the_first_and_last_image():
    figure = plots.film_strip({"x": [PICTURE] * 20}, np.linspace(1, 0.05, 20), max_images=5)
    titles = [ax.get_title() for ax in figure.axes]
    assert (len(titles), titles[0], titles[-1]) == (5, "t = 1.00", "t = 0.05")


def test_an_image_does_not_differ_from_itself():
    assert not images(plots.side_by_side(PICTURE, PICTURE))[2].any()


def test_areas_are_shares_of_the_parameters():
    assert sum(count_parameters(NET).values()) == 343
    counts = {"a.x": 600, "a.y": 300, "b": 100}
    boxes = plots.treemap(counts).axes[0].patches
    areas = [box.get_width() * box.get_height() for box in boxes]
    assert np.allclose(np.array(areas) / sum(areas), [0.6, 0.3, 0.1])
    assert abs(sum(areas) - 16 * 9) < 1e-9


def words(figure):
    """All text of a figure, in one line, with names that were broken after an underscore put together."""
    found = [text.get_text() for text in figure.findobj(Text)]
    return " ".join(" ".join(found).replace("_\n", "_").split())


def test_every_part_of_a_treemap_is_named():
    counts = {f"part_{i}.of_the_model": 2**i for i in range(22)}
    drawn = words(plots.treemap(counts))
    assert all(f"part_{i} of_the_model" in drawn or f"part_{i}.of_the_model" in drawn for i in range(22))


def test_a_gallery_says_whose_attention_it_is_and_how_large():
    shown = words(plots.head_gallery(HEADS, PICTURE, (1, 2)))
    assert "Attention of the framed patch" in shown
    assert all(f"{float(f'{100 * float(m.max()):.2g}'):g}%" in shown for m in HEADS.tensor.flatten(0, 1))
    assert "Attention of “red”" in words(plots.head_gallery(HEADS, query="red"))
    assert f"0 to {float(f'{100 * float(MAPS.tensor[:, 0].max()):.2g}'):g}%" in words(plots.word_maps(MAPS, PICTURE))


def test_one_large_row_does_not_flatten_the_others():
    even, uneven = torch.ones(4, 5), torch.tensor([100.0, 1.0, 2.0, 1.0])[:, None].expand(4, 5)
    assert "logarithmic" not in words(plots.contributions(Named(even, ("block", "step"))))
    figure = plots.contributions(Named(uneven, ("block", "step")))
    assert "logarithmic scale" in words(figure)
    image = figure.axes[0].images[0]
    assert image.norm(2.0) > 0.1  # 0.02 on a linear scale


def test_the_colour_bar_of_an_overlay_has_its_colours():
    """Each cell's colour is that of its weight on the colour bar, up to what the image shines through."""
    shares = np.linspace(0, 1, 6).reshape(2, 3)
    figure = plots.overlay(Image.new("RGB", (48, 32), (120, 120, 120)), shares)
    image = figure.axes[0].images[0].get_array()
    bar = figure.axes[1]._colorbar.mappable
    for i, j in np.ndindex(2, 3):
        assert np.allclose(image[16 * i + 8, 16 * j + 8] / 255, bar.to_rgba(shares[i, j])[:3], atol=0.02)


def test_noise_is_flat_and_a_wave_is_a_peak():
    _, power = radial_power(torch.randn(64, 32, 32, generator=g))
    assert np.allclose(power, 1, atol=0.1)
    wave = torch.cos(2 * torch.pi * 4 / 32 * torch.arange(32.0)).expand(32, 32)  # an eighth of a cycle a cell
    frequency, power = radial_power(wave)
    assert abs(frequency[power.argmax()] - 4 / 32) <= 1 / 16


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: plots.word_maps(HEADS, PICTURE), "axes block, word, row, column, not axes block, head, row, column"),
        (lambda: plots.contributions(torch.rand(3, 3)), "sizes must be of the type Named, not tensor"),
        (lambda: plots.film_strip({"x": [PICTURE], "x0": []}), "equally many"),
        (lambda: plots.side_by_side(PICTURE, PICTURE.resize((8, 8))), "must have the same size"),
        (lambda: plots.overlay(torch.rand(2, 2), MAPS.tensor[0, 0]), r"PIL image or a tensor \[3, H, W\]"),
    ],
)
def test_errors_are_one_sentence(wrong, says):
    with pytest.raises(InstrumentError, match=says):
        wrong()
