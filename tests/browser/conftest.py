"""A real browser, where there is one: Debian's Chromium, Chrome, or what CHROMIUM names.

Without one these tests are skipped, unless FLUXEDU_BROWSER=required (as in CI): then they fail.
"""

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: nothing outside the machine is asked for, whatever a browser likes to ask for by itself
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        wanted = f"no browser was found (looked for {', '.join(NAMES)}; CHROMIUM=/path names another)"
        pytest.fail(wanted) if os.environ.get("FLUXEDU_BROWSER") == "required" else pytest.skip(wanted)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser):
    """A page that must have complained of nothing by the end, and asked the network for nothing but localhost."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "http://localhost", "ws:"))] == []
