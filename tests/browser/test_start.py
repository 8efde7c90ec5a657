"""``fluxedu lab`` as a newcomer meets it: START.ipynb is open and nothing else; a prompt is drawn and explored."""

import os
import subprocess
import sys
import time

import pytest
from conftest import free_port, jupyter_folders, wait_for

PICTURES = ".widget-image"


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    """``fluxedu lab`` with its own configuration, so that no settings of this machine's user count."""
    folder = tmp_path_factory.mktemp("newcomer")
    port, own = free_port(), jupyter_folders(folder) | {"JUPYTER_TOKEN": "t", "HOME": str(folder)}
    command = [sys.executable, "-m", "fluxedu.cli", "lab", "--no-browser", "--port", str(port)]
    with open(folder / "log", "w") as log:
        lab = subprocess.Popen(
            [*command, "--folder", str(folder / "mine")], stdout=log, stderr=log, env=os.environ | own,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://localhost:{port}/api/status?token=t", lab, folder / "log")
            yield f"http://localhost:{port}"
        finally:
            os.killpg(lab.pid, 15)
            lab.wait(20)


def shown(tab) -> list[str]:
    return tab.locator(PICTURES).evaluate_all("images => images.map(image => image.src)")


@pytest.mark.slow
def test_a_newcomer_draws_a_prompt(address, tab):
    tab.goto(f"{address}/?token=t")
    tab.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    assert tab.url.startswith(f"{address}/lab/tree/START.ipynb")
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    assert tab.locator(".jp-Launcher").count() == 0
    tab.locator(".jp-OutputArea img").first.wait_for(timeout=60_000)  # a picture before anything has run

    if folder := os.environ.get("FLUXEDU_SHOTS"):
        tab.screenshot(path=f"{folder}/start_before.png")
    started = time.monotonic()
    tab.locator(".jp-CodeCell .cm-content").first.click()
    tab.keyboard.press("Shift+Enter")
    tab.locator(PICTURES).first.wait_for(timeout=60_000)
    tab.locator(".jp-OutputArea .fluxedu canvas").first.wait_for(timeout=60_000)
    print(f"first picture after {time.monotonic() - started:.1f} s")
    assert tab.locator(".fluxedu-still").count() == 0 or not tab.locator(".fluxedu-still").first.is_visible()

    if folder := os.environ.get("FLUXEDU_SHOTS"):
        tab.screenshot(path=f"{folder}/start.png")
    first = shown(tab)
    prompt = tab.get_by_label("prompt", exact=True)
    prompt.fill("a green star and a cat")
    prompt.press("Enter")
    tab.get_by_text("has never seen the word 'cat'").wait_for(timeout=60_000)
    tab.wait_for_function(f"document.querySelectorAll('{PICTURES}')[1].src != {first[1]!r}", timeout=60_000)
    tab.locator(".fluxedu button", has_text="star").first.wait_for(
        timeout=60_000
    )  # the explorer's words are the new ones
    assert tab.locator(".Toastify__toast").count() == 0  # neither news nor errors
