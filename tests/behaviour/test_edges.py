"""The edges of any picture, for canny: against the definition on a picture whose edges are known."""

import builtins

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.errors import RequestError
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import Scene, SceneObject, edge_map, object_map, render
from fluxedu.sampling.images import edges

pytest.importorskip("cv2")
THINGS = SceneObject("circle", "red", "large", 40, 45, 24), SceneObject("square", "blue", "large", 90, 85, 23)
SCENE = Scene("white", THINGS, 128, 128, 3)


def test_lines_lie_where_things_end():
    """Of things in plain colours every edge lies by a border, and every border by an edge; texture only adds some."""
    plain = np.array([(255, 255, 255), (200, 30, 30), (30, 30, 200)], np.uint8)[object_map(SCENE)]
    true = edge_map(SCENE)[..., 0] > 0
    near = lambda lines: ndimage.distance_transform_edt(~lines) < 2  # noqa: E731
    found, textured = (edges(picture)[..., 0] > 0 for picture in (plain, render(SCENE)))
    assert near(true)[found].all()
    assert near(found)[true].all()
    assert near(textured)[true].all()


def test_a_line_begins_above_high_and_goes_on_above_low():
    """A step of 25 to 100 grey levels: Sobel makes four times as much of it, so 100 to 400."""
    step = np.full((64, 64, 3), 60, np.uint8)
    step[:, 32:] += np.linspace(25, 100, 64).astype(np.uint8)[:, None, None]
    drawn = lambda low, high: (edges(step, low, high)[..., 0] > 0).any(1)  # noqa: E731
    strong, all_of_it = drawn(300, 300), drawn(150, 300)
    assert strong.mean() == pytest.approx(1 - (75 - 25) / 75, abs=0.06)
    assert all_of_it.mean() == pytest.approx(1 - (37.5 - 25) / 75, abs=0.06)  # hysteresis: the weak end is tied to it
    assert not drawn(500, 500).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": np.zeros((4, 4))}, "uint8 .H, W, 3., not float64 .4, 4."),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "not uint8 .0, 4, 3."),
        ({"image": "no-such-file.png"}, "there is no picture no-such-file.png"),
        ({"image": render(SCENE), "low": 9, "high": 3}, "0 <= low <= high, not 9 and 3"),
    ],
)
def test_what_does_not_fit_is_a_sentence(given, message):
    with pytest.raises(RequestError, match=message):
        edges(**given)


def test_without_opencv_a_sentence(monkeypatch):
    there = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "cv2":
            raise ImportError(name)
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match="pip install 'fluxedu.edges.'"):
        edges(render(SCENE))


def test_canny_follows_a_picture_from_a_file(tmp_path):
    """``--control photo.png --edges``: other colours, the same forms at the same positions."""
    Image.fromarray(render(SCENE)).save(tmp_path / "photo.png")
    command = ["sample", "a pink circle and a green square on a black background", "--model", "nano-canny", "--edges"]
    result = CliRunner().invoke(
        app, [*command, "--control", str(tmp_path / "photo.png"), "-o", str(tmp_path / "o.png")]
    )
    assert result.exit_code == 0, result.output
    drawn = np.asarray(Image.open(tmp_path / "o.png"))
    seen = {(t.color, t.form): (t.x, t.y) for t in detect(drawn).objects}
    assert set(seen) == {("pink", "circle"), ("green", "square")}
    for thing, key in zip(THINGS, [("pink", "circle"), ("green", "square")], strict=True):
        assert np.hypot(seen[key][0] - thing.x, seen[key][1] - thing.y) <= 4
    again = fe.load("nano-canny")(command[1], seed=0, control=edges(tmp_path / "photo.png"), trajectory=False)
    assert np.array_equal(np.asarray(again.images[0]), drawn)
    alone = CliRunner().invoke(app, command)
    assert alone.exit_code != 0
    assert "--edges needs --control" in alone.output
