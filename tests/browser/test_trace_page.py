"""The page of a run in a real browser: every stage opens, by mouse and by keyboard, and its pictures are there."""

import pytest

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
    tab.keyboard.press("Tab")
    tab.keyboard.press("Home")
    assert shown(tab) == ["CLIP text encoder"]
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert shown(tab) == ["Noise"]
    tab.keyboard.press("End")
    assert shown(tab) == ["Autoencoder: latent to image"]


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
