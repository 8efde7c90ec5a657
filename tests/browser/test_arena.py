"""The arena in a real browser: the page for a class, and the booth in a notebook, by keyboard."""

import threading

import pytest
from PIL import Image

from fluxedu.arena import Arena, Contestant, create_server

BOOTH = """
from PIL import Image
from fluxedu.arena import Arena, Contestant, booth
flat = lambda name, colour: Contestant(name, lambda prompt, seed, h, w: Image.new("RGB", (w, h), colour))
a = Arena([flat("alpha", "red"), flat("beta", "blue")], "arena.sqlite", prompts=6)
b = booth(a)
b
"""


@pytest.fixture
def server(tmp_path):
    flat = lambda name, colour: Contestant(name, lambda p, s, h, w: Image.new("RGB", (w, h), colour))  # noqa: E731
    arena = Arena([flat("alpha", "red"), flat("beta", "blue")], tmp_path / "v.sqlite", prompts=6)
    with create_server(arena, "localhost", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_visitor_votes_with_three_keys(server, tab):
    tab.goto(server.url)
    for count, (key, choice) in enumerate([("ArrowLeft", "left"), ("ArrowRight", "right"), ("ArrowDown", "tie")], 1):
        tab.locator("#tie:enabled").wait_for()
        tab.keyboard.press(key)
        tab.locator("#count", has_text=f"{count} vote").wait_for()
        assert server.arena.votes.rows()[-1]["choice"] == choice
    tab.locator("#tie:enabled").wait_for()
    tab.click("#left")
    tab.locator("#count", has_text="4 votes").wait_for()
    assert len(server.arena.votes.rows()) == 4 and len({r["voter"] for r in server.arena.votes.rows()}) == 1
    assert "alpha" not in tab.content() and "beta" not in tab.content()
    tab.click("summary")
    tab.locator("#ratings td", has_text="alpha").wait_for()
    tab.select_option("#axis", "diversity")
    tab.locator("#question", has_text="four images").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_enters_the_class_code(server, tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto(server.url.partition("#")[0])
    tab.get_by_label("Class code").wait_for()
    assert not tab.locator("#tie").is_visible() and not tab.locator("#axis").is_visible()
    tab.get_by_label("Class code").fill(f" {server.code.lower()} ")
    tab.get_by_label("Your name").fill("Zoë")
    tab.keyboard.press("Enter")
    tab.locator("#tie:enabled").wait_for()
    assert not tab.get_by_label("Class code").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.keyboard.press("ArrowDown")
    tab.locator("#count", has_text="1 vote").wait_for()
    tab.click("summary")
    tab.locator("#ratings tr", has_text="Zoë").get_by_text("you").wait_for()
    assert [row["voter"] for row in server.arena.votes.rows()] == ["Zoë"]
    tab.reload()  # the same voter, without the code
    tab.locator("#tie:enabled").wait_for()
    assert tab.evaluate("document.cookie") == "", "scripts cannot read the token"


@pytest.fixture
def offline(browser):
    """A page some of whose requests fail, which the browser reports in its console; its script must have no errors."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


def test_after_a_lost_response_the_other_key_shows_the_first_vote_and_goes_on(server, offline):
    offline.goto(server.url)
    offline.get_by_label("question").wait_for()
    offline.locator("#tie:enabled").wait_for()
    offline.route("**/vote", lambda route: (route.fetch(), route.abort()), times=1)  # it arrives, the response does not
    offline.keyboard.press("ArrowLeft")
    offline.locator("#message.error", has_text="The server did not answer.").wait_for()
    offline.keyboard.press("ArrowRight")
    note = "Your first vote on this pair was counted: left. Here is the next pair."
    offline.locator("#message", has_text=note).wait_for()
    offline.locator("#tie:enabled").wait_for()
    offline.keyboard.press("ArrowDown")
    offline.locator("#count", has_text="1 vote").wait_for()
    assert [row["choice"] for row in server.arena.votes.rows()] == ["left", "tie"]


IMPATIENT = """
window.hurry = 6;
const timeout = AbortSignal.timeout.bind(AbortSignal), later = window.setTimeout.bind(window);
AbortSignal.timeout = (ms) => timeout(ms / hurry);
window.setTimeout = (f, ms, ...rest) => later(f, ms / hurry, ...rest);
"""


@pytest.mark.parametrize("how", [lambda route: route.abort(), lambda route: None], ids=["fails", "hangs"])
@pytest.mark.parametrize("path", ["**/join", "**/ballot", "**/picture/*/right"])
def test_what_did_not_arrive_can_be_tried_again(server, offline, path, how):
    offline.add_init_script(IMPATIENT)
    offline.route(path, how)
    offline.goto(server.url)
    offline.get_by_role("button", name="Try again").wait_for()
    offline.unroute(path)
    offline.evaluate("hurry = 1")
    offline.click("#again")
    offline.locator("#tie:enabled").wait_for()
    assert not offline.locator("#again").is_visible()


def test_the_last_pair_is_followed_by_a_sentence(server, offline):
    offline.goto(server.url)
    for count in range(1, 7):
        offline.locator("#tie:enabled").wait_for()
        offline.keyboard.press("ArrowDown")
        offline.locator("#count", has_text=f"{count} vote").wait_for()
    done = "You have judged all pairs for this question. Choose another question above."
    offline.locator("#message.error", has_text=done).wait_for()
    assert not offline.locator("#again").is_visible()


def test_a_booth_in_a_notebook_takes_the_keys(run):
    page = run(BOOTH, name="arena")
    live = page.locator(".fluxedu").first
    live.locator(".buttons button").first.focus()
    for count, key in enumerate(["ArrowLeft", "ArrowDown", "ArrowRight"], 1):
        page.keyboard.press(key)
        live.locator(".caption", has_text=f"Votes so far: {count}.").wait_for()
    assert "alpha" not in live.inner_text() and "beta" not in live.inner_text()
