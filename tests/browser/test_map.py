"""The map of the model in a real browser: readable at every width, by mouse, keyboard and screen reader."""

from pathlib import Path

import pytest
from axe import complaints

import fluxedu
from fluxedu.instruments.wiring import boxes, for_pages, wiring

PACKAGE = Path(fluxedu.__file__).parent
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Map</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ margin: 8px; background: white; }} {style}</style></head>
<body><main><h1>The model</h1><div id="one"></div><div id="two"></div></main>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}
const wiring = JSON.parse(document.getElementById("data").textContent);
const values = (site, step) => Promise.resolve({{ kind: "pixels", width: 8, height: 4, title: site + " " + step,
  data: new Uint8Array(96).fill(20 * step + 40) }});
const make = (id, more) => fluxeduMap.createMap(document.getElementById(id), {{ wiring, values, ...more }});
window.map = make("one", {{ times: [1, 0.7, 0.4, 0] }});
window.other = make("two");
</script></body></html>"""

#: what is drawn too small or larger than its box, in all drawings that can be seen
UNREADABLE = """() => [...document.querySelectorAll("#one svg text")].flatMap((t) => {
  if (!t.getClientRects().length) return [];
  const size = parseFloat(getComputedStyle(t).fontSize) * t.getCTM().a, g = t.closest("[data-id]"), faults = [];
  if (size < 11) faults.push(`${t.textContent}: ${size} px`);
  if (g && !g.classList.contains("frame")) {
    const [a, b] = [t, g.querySelector("rect")].map((e) => e.getBoundingClientRect());
    if (a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 2 || a.bottom > b.bottom + 2)
      faults.push(`${t.textContent} does not fit into its box`);
  }
  return faults;
})"""
SMALL = """() => [...document.querySelectorAll("#one :is(p, span, button, dt, dd, code, pre, output, label, div)")]
  .filter((e) => e.getClientRects().length && parseFloat(getComputedStyle(e).fontSize) < 11).map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    script, style = ((PACKAGE / name).read_text(encoding="utf-8") for name in ("map.js", "map.css"))
    path = tmp_path_factory.mktemp("map") / "map.html"
    data = for_pages().replace("</", "<\\/")
    path.write_text(PAGE.format(script=script, style=style, data=data), encoding="utf-8")
    return path.as_uri()


def test_it_can_be_read_at_every_width(tab, address):
    tab.emulate_media(reduced_motion="reduce")
    for width in (360, 800, 1440):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(address)
        for opened in (None, "double.0", "single.0", "vec.all", "t5.encoder.block.0", "ae.decoder"):
            if opened:
                tab.evaluate("(id) => map.open(id)", opened)
            assert tab.evaluate(UNREADABLE) == [], (width, opened)
            assert tab.evaluate(SMALL) == [], (width, opened)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, opened)


def test_every_box_shows_what_it_is(tab, address):
    """All boxes can be shown, with title, formula, explanation and value; no two elements share an id."""
    tab.emulate_media(reduced_motion="reduce")
    tab.goto(address)
    chosen = {}
    for box in boxes(wiring()):  # one of each kind of box is enough, and there are hundreds
        chosen.setdefault(box["formula"], box)
    for box in chosen.values():
        tab.evaluate("(id) => map.show(id)", box["id"])
        panel = tab.locator("#one .map-panel")
        assert panel.locator(".map-title").inner_text() == box["title"]
        assert panel.locator("p").first.inner_text() == box["text"]
        assert panel.locator("math").bounding_box()["width"] > 5
        if "inside" not in box:
            assert tab.locator(f'#one [data-id="{box["id"]}"]').is_visible()
        if box["site"]:
            panel.locator(".map-axes", has_text=f"{box['site']} 0").wait_for()
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_the_keyboard_is_enough(tab, address):
    tab.goto(address)
    tab.locator("#one [data-id=prompt]").focus()
    focused = lambda: tab.evaluate("document.activeElement.dataset.id")  # noqa: E731
    panel = tab.locator("#one .map-panel .map-title")
    for key, there in (("ArrowRight", "t5_tokenizer"), ("ArrowRight", "t5"), ("ArrowDown", "clip")):
        tab.keyboard.press(key)
        assert focused() == there
    assert panel.inner_text() == "CLIP"  # what has the focus is described
    assert tab.locator("#one [data-id=clip]").get_attribute("aria-expanded") == "false"
    tab.keyboard.press("Enter")
    assert tab.locator("#one [data-id=clip]").get_attribute("aria-expanded") == "true"
    assert focused() == "clip.text_model.embedded"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.locator("#one .map-crumbs").inner_text().replace("\n", " ") == "The model › CLIP › Layer 0"
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    assert focused() == "clip"
    assert tab.locator("#one .map-crumbs").inner_text().startswith("The model")


def test_a_tap_on_a_phone_explains_at_once(browser, address):
    """The box and its explanation are both in the window, whatever the height of the map."""
    tab = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, reduced_motion="reduce")
    tab.goto(address)
    for name in ("clip", "double.1", "single.5", "velocity.all"):
        box = tab.locator(f"#one [data-id='{name}']").first
        box.tap()
        top = tab.locator("#one .map-title").bounding_box()["y"]
        assert 0 < top < 700, name
        rect = box.bounding_box()
        assert 0 < rect["y"] and rect["y"] + rect["height"] < top, name
        tab.get_by_role("button", name="Close the description").first.tap()
    tab.close()


def test_time_moves_the_values(tab, address):
    tab.goto(address)
    tab.locator("#one [data-id=img_in]").click()
    tab.locator("#one .map-axes", has_text="img_in 0").wait_for()
    tab.locator("#one").get_by_role("slider", name="Time").press("ArrowRight")
    tab.locator("#one .map-axes", has_text="img_in 1").wait_for()
    tab.locator("#one").get_by_role("button", name="Play").click()
    tab.locator("#one .map-axes", has_text="img_in 3").wait_for()
    assert tab.locator("#one output").inner_text() == "t = 0.00"
    tab.evaluate("map.pulse('double.1')")
    assert tab.locator("#one .pulse").get_attribute("data-id") == "double.1"
    tab.evaluate("map.pulse(null)")
    assert tab.locator("#one .pulse").count() == 0


def test_it_unfolds_at_once(tab, address):
    """From the click to the drawing: half of ten within a tenth of a second."""
    tab.goto(address)
    took = tab.evaluate(
        """async () => {
          const took = [];
          for (let i = 0; i < 10; i++) {
            map.close();
            await new Promise((go) => setTimeout(go, 30));
            const start = performance.now();
            const block = document.querySelector(`#one [data-id="${i % 2 ? "single.3" : "double.0"}"]`);
            block.dispatchEvent(new MouseEvent("click"));
            document.querySelector("#one .map-below svg").getBoundingClientRect();
            took.push(performance.now() - start);
          }
          return took.sort((a, b) => a - b);
        }"""
    )
    assert took[5] <= 100, took


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(tab, address, scheme):
    tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    tab.goto(address)
    tab.evaluate("map.open('double.0')")
    tab.locator("#one .map-value canvas").wait_for()
    assert complaints(tab, "main") == []
