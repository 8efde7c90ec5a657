"""The page of a run in a real browser: every stage opens, by mouse and by keyboard, and its pictures are there."""

import re

import pytest
from axe import complaints

import fluxedu as fe
from fluxedu.trace import page, stages


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page made by the miniature, opened as a file."""
    path = tmp_path_factory.mktemp("trace") / "out.html"
    prompt = "a red circle left of a blue square"
    _, found = stages(fe.load(), prompt, steps=4, progress=False)
    path.write_text(page(prompt, "nano, seed 0, 4 steps", found), encoding="utf-8")
    return path.as_uri()


def shown(tab):
    """The headings that can be seen in the panels."""
    return [h.inner_text() for h in tab.locator("section h2").all() if h.is_visible()]


def test_every_stage_opens(tab, address):
    tab.goto(address)
    buttons = tab.get_by_role("tab").all()
    assert len(buttons) == 5 + 8 + 3
    for button in buttons:
        button.click()
        assert shown(tab) == [button.inner_text()]
        assert button.get_attribute("aria-selected") == "true"
        for value in tab.locator("section:visible img.value").all():
            assert value.evaluate("image => image.naturalWidth") >= 1
            assert value.bounding_box()["width"] > 100
        for image in tab.locator("section:visible figure img").all():
            width = image.evaluate("image => image.naturalWidth")
            assert width > 100
            assert 50 < image.bounding_box()["width"] <= 1200


def test_the_keyboard_is_enough(tab, address):
    tab.goto(address)
    tab.locator("#map [role=button]").first.wait_for()
    for _ in range(12):  # the map's controls come first
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.role") == "tab":
            break
    tab.keyboard.press("Home")
    assert shown(tab) == ["CLIP text encoder"]
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert shown(tab) == ["Noise"]
    tab.keyboard.press("End")
    assert shown(tab) == ["Autoencoder: latent to image"]


def test_the_map_shows_the_values_of_every_step(tab, address):
    """A box opens, and moving the time changes its value, its numbers and the mark in its curves."""
    tab.goto(address)
    tab.get_by_role("button", name="Single-stream block 2, opens").click()
    tab.get_by_role("button", name="Modulate", exact=True).click()
    value = tab.locator("#map .map-value")
    value.locator("canvas").wait_for()
    look = """v => [v.querySelector("canvas").toDataURL(), v.querySelector(".map-words").textContent,
                    v.querySelector(".at").getAttribute("d")]"""
    seen = [value.evaluate(look)]
    for _ in range(3):
        tab.get_by_role("slider", name="Time").press("ArrowRight")
        tab.wait_for_function(
            "(was) => document.querySelector('#map .map-words')?.textContent !== was", arg=seen[-1][1]
        )
        seen.append(value.evaluate(look))
    for column in zip(*seen, strict=True):
        assert len(set(column)) == 4
    pipe = fe.load()
    with fe.record("single.2.modulated", reduce="summary") as rec:
        pipe("a red circle left of a blue square", steps=4, progress=False)
    for (_, words, _), numbers in zip(seen, rec["single.2.modulated"].tensor.tolist(), strict=True):
        found = [float(x) for x in re.findall(r"-?[\d.]+\d", words)]
        assert found == pytest.approx(numbers, rel=0.006)
    tab.get_by_role("slider", name="Time").press("Home")
    before = tab.locator("#map image.live").first.get_attribute("href")
    tab.get_by_role("button", name="Play").click()
    tab.locator("#map output", has_text="t = 1.00").wait_for(state="detached")
    tab.get_by_role("button", name="Play").wait_for()  # it stops at the last step
    assert tab.get_by_role("slider", name="Time").input_value() == "3"
    assert tab.locator("#map image.live").first.get_attribute("href") != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_axe_finds_nothing(tab, address, scheme):
    tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    tab.goto(f"{address}#single-2")
    tab.locator("#map [role=button]").first.wait_for()
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", ")
    assert (int(ground[0]) < 60) == (scheme == "dark")
    assert complaints(tab) == []


def test_a_stage_can_be_linked_to(tab, address):
    tab.goto(f"{address}#single-2")
    assert shown(tab) == ["Single-stream block 2"]
    assert tab.locator("table:visible code").first.inner_text() == "single.2.x"
    assert tab.evaluate("scrollY") == 0


def test_a_narrow_screen_scrolls_one_way_only(tab, address):
    tab.set_viewport_size({"width": 420, "height": 800})
    tab.goto(address)
    for button in tab.get_by_role("tab").all():
        button.click()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
