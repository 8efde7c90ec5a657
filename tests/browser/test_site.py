"""The built site, as a reader opens it: from the file system, light and dark, on a wide screen and on a telephone.

`make docs` builds it and runs this; where nothing is built it is left out.
"""

from pathlib import Path

import pytest

from fluxedu.instruments.wiring import boxes, wiring

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
NOTEBOOKS = sorted((SITE / "notebooks").glob("[0-9]*.html"))
PAGES = [*"index start architecture official faq recipes coming_from weights teaching glossary api".split()]
PAGES += [f"api/{path.stem}" for path in sorted((SITE / "api").glob("*.html"))]
PAGES += [f"notebooks/{path.stem}" for path in NOTEBOOKS]

SEEN = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => {
      v = v / 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(document.body);
  const wide = [...document.querySelectorAll("article *")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest("pre, .table-wrapper, .highlight, .cell_output, table, svg, .output, mjx-container, .math"));
  return {
    ground: light(style.backgroundColor), ink: light(style.color),
    over: document.documentElement.scrollWidth - innerWidth,
    wide: wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 120)),
    broken: [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src.slice(0, 80)),
    heads: document.querySelectorAll("h1").length,
  };
}"""


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_can_be_read(tab, width, scheme):
    """Nothing is fetched and no error logged (the tab sees to that); pictures are there, nothing runs off the side."""
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    for page in PAGES:
        tab.goto(f"file://{SITE}/{page}.html")
        seen = tab.evaluate(SEEN)
        assert seen["heads"] >= 1, page
        assert seen["broken"] == [], page
        assert seen["over"] <= 1 and seen["wide"] == [], (page, seen)
        lighter, darker = sorted((seen["ground"], seen["ink"]), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 7, page  # WCAG's AAA
        assert (seen["ground"] < 0.1) == (scheme == "dark"), page


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs")
def test_the_map_leads_to_the_code(tab):
    """A box of the map opens, shows its value, and leads to the lines that make it; so do the tables below."""
    tab.goto(f"file://{SITE}/architecture.html")
    tab.get_by_role("button", name="T5, opens").click()
    tab.get_by_role("button", name="Text vectors").click()
    panel = tab.get_by_role("group", name="The chosen box")
    panel.locator("canvas").wait_for()
    for box in boxes(wiring()):
        assert (SITE / "_modules" / "fluxedu" / box["source"].partition(":")[0].replace(".py", ".html")).exists()
    panel.get_by_role("link").click()
    assert "/_modules/fluxedu/models/t5.html" in tab.url
    assert 'self.probe("states"' in tab.locator("article").inner_text()
    tab.goto(f"file://{SITE}/architecture.html#part-t5")
    tab.locator("#part-t5, section:has(#part-t5)").last.locator("a[href^='_modules/']").first.click()
    assert "class T5Encoder" in tab.locator("article").inner_text()


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs")
def test_what_an_exercise_hides_can_be_unfolded(tab):
    """The picture behind an exercise is on the site, folded."""
    tab.goto(f"file://{SITE}/notebooks/13-look-inside.html")
    folded = tab.locator("details", has_text="What it shows once solved").first
    assert not folded.locator("img").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("img").first.is_visible()
