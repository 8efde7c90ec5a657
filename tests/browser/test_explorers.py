"""The explorers in JupyterLab in a real browser: a control moves, the view changes, and the console shows no error."""

import nbformat
import pytest
from bare import mount

import fluxedu as fe
from fluxedu import widgets

BEGIN = """
import fluxedu as fe
from fluxedu import widgets
pipe, prompt = fe.load(), "a red circle left of a blue square"
"""


def content(tab):
    """Everything an explorer shows as one string: canvases as pixels, drawings and texts as HTML."""
    return tab.evaluate(
        """() => {
          const all = (what) => [...document.querySelector(".fluxedu").querySelectorAll(what)];
          const canvases = all("canvas").map((c) => c.toDataURL());
          return [...canvases, ...all("svg, .mark, .caption").map((e) => e.outerHTML)].join();
        }"""
    )


def after(tab, act):
    """What is shown after ``act``, once the kernel has answered."""
    tab.evaluate(
        """() => {
          window.answered = false;
          const root = document.querySelector(".fluxedu");
          root.addEventListener("fluxedu:answered", () => (window.answered = true), { once: true });
        }"""
    )
    act()
    tab.wait_for_function("window.answered")
    return content(tab)


def test_attention(run):
    tab = run(BEGIN, "widgets.attention(pipe, prompt, progress=False)")
    canvas = tab.locator(".fluxedu canvas").first
    canvas.wait_for()
    views = [content(tab)]
    box = canvas.bounding_box()
    views.append(after(tab, lambda: tab.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])))
    assert "in row 1, column 8 gives" in views[-1]
    canvas.focus()
    views.append(after(tab, lambda: tab.keyboard.press("ArrowDown")))
    assert "in row 2, column 8 gives" in views[-1]
    word = tab.locator(".fluxedu").get_by_role("radio", name="square")
    views.append(after(tab, word.hover))
    assert "attends most to “square”" in views[-1]
    views.append(after(tab, lambda: tab.locator(".fluxedu select").first.select_option("double.0")))
    views.append(after(tab, lambda: tab.locator(".fluxedu input").first.press("ArrowRight")))
    assert len(set(views)) == len(views)
    assert tab.locator("img.fluxedu-still").is_hidden()


def moved(tab, part):
    """What is shown after a control or panel was moved by the keyboard: to the right, or to the left from its end."""
    if part.evaluate("(e) => e.tagName") == "SELECT":
        other = part.evaluate("(e) => (e.selectedIndex + 1) % e.options.length")
        return after(tab, lambda: part.select_option(index=other))
    part.focus()
    at_the_end = part.evaluate("(e) => e.value ? e.value === e.max : e.ariaLabel === 'Image'")  # a slider's, the map's
    return after(tab, lambda: tab.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight"))


MADE = {
    "architecture": "widgets.architecture(pipe, prompt, steps=4, progress=False)",
    "grid": "widgets.grid(pipe, prompt, steps=(1, 4), guidance_scales=(1, 3, 6), progress=False)",
    "heads": "widgets.heads(pipe, prompt, steps=1)",
    "latents": "widgets.latents(pipe, prompt, steps=4, progress=False)",
    "modulation": "widgets.modulation(pipe, [prompt, 'a letter K'])",
    "trajectory": "widgets.trajectory(pipe, prompt, steps=4, progress=False)",
    "velocity": "widgets.velocity(pipe, [prompt, 'a green star'], seeds=3, steps=4, progress=False)",
}


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.mark.parametrize("name", MADE)
def test_every_control_and_panel_responds_to_the_keyboard(tab, pipe, name):
    """On a page without Jupyter."""
    mount(tab, eval(MADE[name], {"widgets": widgets, "pipe": pipe, "prompt": "a red circle left of a blue square"}))
    views = [content(tab)]
    movable = "input, select, [data-pointer]:not([data-pointer='']), g[tabindex='0']"
    parts = tab.locator(".fluxedu").locator(movable)
    for i in reversed(range(parts.count())):
        views.append(moved(tab, parts.nth(i)))
    assert parts.count() >= (1 if name == "trajectory" else 2)
    assert len(set(views)) == len(views)


OTHERS = sorted({*widgets.explorers()} - {*MADE, "attention"})


@pytest.mark.parametrize("name", OTHERS)
def test_its_example_answers(tab, pipe, name):
    """The other explorers: one of the first three things that can be moved changes what is shown."""
    explorer = widgets.explorers()[name].example(pipe)
    mount(tab, explorer.set(cell=(0, 0)) if "cell" in explorer.first else explorer)  # from where a key leads on
    before = content(tab)
    choice = "select:has(option + option), .buttons[role='group'] > button"
    parts = tab.locator(".fluxedu").locator(f"[data-pointer]:not([data-pointer='']), input, g[tabindex='0'], {choice}")
    assert any(moved(tab, parts.nth(i)) != before for i in range(min(parts.count(), 3)))


SLOW = """
import numpy as np
from fluxedu.widgets.explorer import Explorer, Slider, View
from fluxedu.widgets.panels import Pixels
class Slow(Explorer):
    _esm = "await new Promise((go) => setTimeout(go, 2500));" + Explorer._esm
def draw(step, cell):
    image = np.full((64, 64, 3), step, np.uint8)
    return View([Pixels("p", image, (8, 8), cell, pointer="cell")], f"step {step} {cell}")
made = [Slow(f"Question {i}?", [Slider("step", "step", "abcdef")], draw, {"cell": (0, 0)}) for i in range(2)]
made[0].set(step=2)
None
"""


def test_a_script_that_loads_slowly(run, tab):
    """After two seconds anywidget gives up on a widget, and refuses its messages; explorers appear and answer."""
    run(SLOW, "made[0]", "made[1]", "made[1].set(step=4); None", name="slow")
    assert tab.locator("img.fluxedu-still").first.is_visible()  # until the live one is painted
    tab.wait_for_function("document.querySelectorAll('.fluxedu canvas').length === 2")
    tab.wait_for_function("[...document.querySelectorAll('img.fluxedu-still')].every((image) => image.hidden)")
    assert tab.locator("img.fluxedu-still").count() == 2
    caption = "document.querySelectorAll('.caption')[{}].textContent === 'step {} (0, 0)'"
    for i, step in enumerate((2, 4)):  # moved by the kernel before and while the script was loading
        tab.wait_for_function(caption.format(i, step))
        tab.locator(".fluxedu input").nth(i).press("ArrowRight")
        tab.wait_for_function(caption.format(i, step + 1))
    anywidgets = [text for text in tab.complaints if "[anywidget] Failed to initialize model" in text]
    assert anywidgets  # the fault was there
    tab.complaints[:] = [text for text in tab.complaints if text not in anywidgets]


def test_quick_keys_all_count(run):
    """A key that is held down repeats every 30 ms, faster than a kernel may answer."""
    tab = run(BEGIN, MADE["latents"], name="quick")
    canvas = tab.locator(".fluxedu canvas[data-pointer='cell']")
    canvas.wait_for()
    canvas.focus()
    for key in ["ArrowLeft"] * 8:
        tab.keyboard.press(key)
        tab.wait_for_timeout(30)
    caption = "document.querySelector('.fluxedu .caption').textContent"
    tab.wait_for_function(f"{caption}.includes('row 9, column 1:')")
    slider = tab.locator(".fluxedu input").first
    slider.focus()
    for key in ["ArrowLeft"] * 20 + ["ArrowRight"] * 5:
        tab.keyboard.press(key)
        tab.wait_for_timeout(30)
    tab.wait_for_function(f"{caption}.includes('channel 5')")


def test_a_click_pins_the_pointer(run):
    tab = run(BEGIN, MADE["latents"], name="hold")
    canvas = tab.locator(".fluxedu canvas[data-pointer='cell']")
    canvas.wait_for()
    box = canvas.bounding_box()
    to = lambda x, y: tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    after(tab, lambda: to(0.1, 0.1))
    tab.mouse.down()
    tab.mouse.up()
    to(0.9, 0.9)
    tab.wait_for_timeout(500)
    assert "row 2, column 2:" in tab.locator(".fluxedu .caption").inner_text()
    after(tab, lambda: tab.mouse.down())
    assert "row 15, column 15:" in tab.locator(".fluxedu .caption").inner_text()


def test_the_map_opens_down_to_a_value(run):
    """It begins with the image, in its own shape; a block opens into its wiring, and a box there shows its value."""
    tab = run(BEGIN, MADE["architecture"], name="map")
    root = tab.locator(".fluxedu")
    panel = root.get_by_role("group", name="The chosen box")
    panel.locator("canvas").first.wait_for()
    assert panel.locator(".map-title").inner_text() == "Image"
    size = panel.locator("canvas").first.bounding_box()
    assert abs(size["width"] / size["height"] - 1) < 0.05
    after(tab, root.get_by_role("button", name="Double-stream block 1, opens").click)
    after(tab, root.get_by_role("button", name="Attention map", exact=True).click)
    assert "double.1.attn.map [B, 5, T, T]: " in root.locator(".caption").inner_text()
    assert "double.1.attn.map" in panel.inner_text()
    assert panel.locator("canvas").first.evaluate("c => c.width === c.height && c.width > 30")


def test_without_a_kernel_there_is_a_static_figure(run, lab):
    """A saved notebook, opened again by a Lab that has no kernel for it, shows the static figure."""
    tab = run(BEGIN, MADE["trajectory"], name="still")
    tab.locator(".fluxedu").wait_for()
    tab.evaluate("jupyterapp.commands.execute('docmanager:save')")
    tab.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    folder, _ = lab
    path = folder / "still.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.metadata.kernelspec = {"name": "gone", "display_name": "Gone", "language": "python"}
    nbformat.write(notebook, path)
    run.show("still.ipynb", 0, execute=False)
    still = tab.locator("img.fluxedu-still, .jp-RenderedHTMLCommon img").first
    still.wait_for()
    assert still.evaluate("(image) => image.naturalWidth") > 300
