"""Explorers on a page without Jupyter: what is shown, by which names, at which widths, and how it is played.

The moves are answered by the explorers in this process; the script and the messages are those of a notebook.
"""

import re

import numpy as np
import pytest
from axe import complaints
from bare import mount

import fluxedu as fe
from fluxedu import widgets
from fluxedu.widgets.explorer import Chips, Choice, Explorer, Slider, Try, View
from fluxedu.widgets.panels import Boxes, Lines, Pixels, Points, sequential

TABLE = np.linspace(0, 1, 40).reshape(8, 5)
BLOCKS = [f"double.{i}.img_attn" for i in range(8)]


def made(title="Which block?"):
    """An explorer with every kind of control and panel."""
    controls = [
        Slider("step", "time", ["t = 1.00", "t = 0.50", "t = 0.00"]),
        Choice("head", "head", ["all", "head 0"]),
        Chips("word", "word", ["a", "red", "circle"]),
    ]

    def draw(step, head, word, cell, point, box):
        shown = TABLE * (1 + step)
        xy = np.array([[0.1, 0.2], [10.0, 20.0], [15.0, 5.0]])
        panels = [
            Pixels("Size", sequential(shown, 3.0), (8, 5), cell, ("0", "3"), rows=BLOCKS, columns=range(5),
                   unit="of its norm", axes=("block", "head"), pointer="cell"),
            Pixels("The same scene", sequential(np.eye(2, 4)), (2, 4)),
            Pixels("A picture", np.full((32, 64, 3), (210, 30, 40), np.uint8)),
            Lines("Curves", [0, 1, 2, 3], {"error": [0.1, 0.2, 0.15, 0.3], "angle": [10, 40, 80, 88]}, "layer",
                  units={"error": "share", "angle": "degrees"}),
            Points("Points", xy, xy * 0 + 1, [0, 1, 1], ["one", "two"], ((-1, 20), (0, 25)), "x", "y", point,
                   pointer="point"),
            Boxes("Diagram", [("first part", 0, 0, 80, 20, "#2563eb"), ("second part", 0, 40, 80, 20, "#2563eb")],
                  [(40, 20, 40, 40)], (100, 70), box, pointer="box"),
        ]  # fmt: skip
        return View(panels, f"step {step}, head {head}, word {word}, cell {cell}", {"word": [0.2, 1.0, 0.5]})

    tries = [Try("What does the last step say?", step=2, cell=(7, 4)), Try("And the first?", step=0)]
    instruction = "Point at a cell to see its number."
    pointers = {"cell": (0, 0), "point": 0, "box": 0}
    return Explorer(title, controls, draw, pointers, instruction=instruction, tries=tries, play="step")


@pytest.fixture(scope="module")
def page(browser):
    """One page for all tests of this file, with the same explorer twice and one with another name."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    twice = made()
    mount(tab, twice, twice, made("Another question?"))
    yield tab
    tab.close()


def first(page):
    return page.locator(".fluxedu").first


def caption(page, text):
    page.wait_for_function("(t) => document.querySelector('.fluxedu .caption').textContent.includes(t)", arg=text)


def test_ids_occur_once_and_name_their_own_controls(page):
    ids = page.eval_on_selector_all("[id]", "(all) => all.map((e) => e.id)")
    assert len(ids) == len(set(ids)) > 20
    inside = """(root) => [...root.querySelectorAll("label[for], [aria-labelledby], [aria-describedby], [marker-end]")]
      .every((e) => ["for", "aria-labelledby", "aria-describedby", "marker-end"].filter((name) => e.hasAttribute(name))
        .every((name) => root.querySelector("#" + e.getAttribute(name).replace(/url\\(#(.*)\\)/, "$1"))))"""
    assert all(root.evaluate(inside) for root in page.locator(".fluxedu").all())
    page.get_by_label("head", exact=True).nth(2).select_option("head 0")
    page.wait_for_function("document.querySelectorAll('.caption')[2].textContent.includes('head 1,')")
    assert "head 0" in first(page).locator(".caption").inner_text()
    assert page.get_by_role("group", name="Another question?").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 1190 if scheme == "dark" else 1200, "height": 900})
    dark = "(dark) => document.querySelector('.fluxedu').dataset.dark === dark"
    page.wait_for_function(dark, arg="true" if scheme == "dark" else "false")
    assert complaints(page, ".fluxedu") == []
    page.emulate_media(color_scheme="light")


def test_the_question_is_a_heading_below_the_pages(page):
    heading = page.get_by_role("heading", name="Which block?").first
    assert heading.evaluate("(e) => e.tagName") == "H2"
    assert first(page).get_by_text("Point at a cell to see its number.").is_visible()


def test_suggestions_and_reset(page):
    root = first(page)
    root.get_by_role("button", name="Try: What does the last step say?").click()
    caption(page, "step 2, head 0, word 0, cell (7, 4)")
    root.get_by_role("button", name="Reset").click()
    caption(page, "step 0, head 0, word 0, cell (0, 0)")


def test_play_runs_to_the_end_and_stops_at_a_move_by_hand(page):
    root = first(page)
    play = root.get_by_role("button", name="Play time")
    play.click()
    root.get_by_role("button", name="Pause time").wait_for()
    caption(page, "step 2,")
    play.wait_for()
    play.click()  # from the end it starts again
    caption(page, "step 0,")
    root.get_by_label("head", exact=True).select_option("head 0")
    play.wait_for()
    root.get_by_role("button", name="Reset").click()
    caption(page, "step 0, head 0")


def test_the_value_under_the_pointer(page):
    """By mouse and by keyboard: what row and column it is, the number, and its unit."""
    root = first(page)
    canvas = root.locator("canvas").first
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.95 * box["height"])
    caption(page, "cell (7, 4)")
    assert root.locator(".tip").inner_text().split("\n") == ["block double.7.img_attn, head 4", "1 of its norm"]
    page.mouse.move(0, 0)
    assert root.locator(".tip").is_hidden()
    canvas.focus()
    page.keyboard.press("ArrowUp")
    caption(page, "cell (6, 4)")
    value = f"{TABLE[6, 4]:.3g} of its norm"
    assert root.locator(".tip").inner_text().split("\n") == ["block double.6.img_attn, head 4", value]
    assert root.locator(".spoken[aria-live]").inner_text().endswith(value)
    curves = root.locator(".lines .drawing")
    curves.focus()
    page.keyboard.press("ArrowRight")
    assert root.locator(".tip").inner_text().split("\n") == ["layer: 1", "error: 20%", "angle: 40 degrees"]
    picture = root.locator("canvas").nth(2)
    picture.focus()
    page.keyboard.press("ArrowDown")
    assert "red 210, green 30, blue 40" in root.locator(".tip").inner_text()
    page.keyboard.press("Tab")
    root.get_by_role("button", name="Reset").click()
    caption(page, "cell (0, 0)")


def test_a_place_in_one_image_is_framed_in_the_others(page):
    """In those of the same scene, not in a table of blocks and heads."""
    root = first(page)
    box = root.locator("canvas").nth(1).bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.9 * box["height"])
    frames = [root.locator(".echo").nth(i) for i in range(3)]
    assert [frame.is_visible() for frame in frames] == [False, False, True]
    place, picture = frames[2].bounding_box(), root.locator("canvas").nth(2).bounding_box()
    assert abs((place["x"] - picture["x"]) / picture["width"] - 0.75) < 0.02
    assert abs((place["y"] - picture["y"]) / picture["height"] - 0.5) < 0.02
    page.mouse.move(0, 0)
    assert not frames[2].is_visible()


def test_axes_have_ticks_and_units(page):
    charts = first(page).locator(".lines svg")
    assert charts.count() == 2  # one for each unit
    for i, unit in enumerate(["share", "degrees"]):
        assert unit in first(page).locator(".lines .legend").nth(i).inner_text()
        numbers = [t for t in charts.nth(i).locator("text").all_text_contents() if re.fullmatch(r"[−\d.]+", t)]
        assert len(numbers) >= 8
    points = first(page).locator(".points svg text").all_text_contents()
    assert len([t for t in points if re.fullmatch(r"[−\d.]+", t)]) >= 8


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_at_any_width(page, width):
    """Nothing is wider than the page, no text is under 11 px or outside its drawing, and pictures keep their shape."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    small = """() => [...document.querySelectorAll(".fluxedu *")].filter((e) => {
      const size = parseFloat(getComputedStyle(e).fontSize), m = e.getScreenCTM?.();
      const scale = m ? Math.hypot(m.a, m.b) : 1;
      return [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && size * scale < 10.99;
    }).map((e) => e.outerHTML)"""
    assert page.evaluate(small) == []
    outside = """() => [...document.querySelectorAll(".fluxedu .chart svg")].flatMap((svg) => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter((t) => {
        const box = t.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
      }).map((t) => t.textContent);
    })"""
    assert page.evaluate(outside) == []
    picture = first(page).locator("canvas").nth(2).bounding_box()
    assert abs(picture["width"] / picture["height"] - 2) < 0.05
    table = first(page).locator("canvas").first.bounding_box()
    assert table["width"] >= 150
    rows = first(page).locator(".names.rows span")
    assert rows.count() >= 4 and rows.first.inner_text() == BLOCKS[0]


def test_a_view_that_cannot_be_drawn_says_what_to_do(browser):
    broken = made()
    broken.view = {}
    tab = browser.new_page()
    mount(tab, broken)
    assert tab.locator(".fluxedu").inner_text() == "This explorer could not be drawn. Re-run this cell."
    tab.close()


def test_a_tap_moves_the_pointer_and_leaves_the_page_to_scroll(browser):
    tab = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True, reduced_motion="reduce")
    mount(tab, made())
    canvas = tab.locator("canvas").first
    assert canvas.evaluate("(e) => getComputedStyle(e).touchAction") == "manipulation"
    box = canvas.bounding_box()
    tab.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.05 * box["height"])
    caption(tab, "cell (0, 2)")
    assert tab.locator(".tip").inner_text().split("\n")[0] == f"block {BLOCKS[0]}, head 2"
    tab.get_by_role("button", name="Next time").click()  # where motion is unwelcome, time moves by a click
    caption(tab, "step 1,")
    tab.wait_for_timeout(700)
    caption(tab, "step 1,")
    tab.close()


def test_two_maps_on_a_page(browser):
    """Each has its own arrowheads and its own names, although each widget brings its own copy of the script."""
    tab, pipe = browser.new_page(viewport={"width": 900, "height": 900}), fe.load()
    made = widgets.architecture(pipe, "a red circle", steps=1, progress=False)
    mount(tab, made, made)
    tab.locator(".map-view svg[viewBox]").nth(1).wait_for()  # each is drawn once its width is known
    ids = tab.eval_on_selector_all("[id]", "(all) => all.map((e) => e.id)")
    assert len(ids) == len(set(ids)) > 15
    assert complaints(tab, ".fluxedu") == []
    tab.close()
