"""A real browser, where there is one: Debian's Chromium, Chrome, or what CHROMIUM names.

Without one these tests are skipped, unless FLUXEDU_BROWSER=required (as in CI): then they fail.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: no requests leave the machine, not even those that a browser makes by itself
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: nor by JupyterLab
ALONE = [
    "--no-browser",
    "--allow-root",
    "--LabApp.expose_app_in_browser=True",
    "--LabApp.extension_manager=readonly",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=",
    "--ServerApp.disable_check_xsrf=True",
]


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        message = f"no browser was found (looked for {', '.join(NAMES)}; CHROMIUM=/path names another)"
        pytest.fail(message) if os.environ.get("FLUXEDU_BROWSER") == "required" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser):
    """A page that by the end must have reported no errors and requested nothing but localhost."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)  # a busy machine is no fault
    complaints, requested = [], []
    page.complaints = complaints  # a test of a fault takes out those that it expects
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    yield page
    page.close()
    assert complaints == []
    here = ("file:", "data:", "blob:", "http://localhost:", "ws://localhost:")
    assert [url for url in requested if not url.startswith(here)] == []


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def jupyter_folders(folder):
    """Environment variables by which JupyterLab keeps everything in ``folder``, and nothing of this user's counts."""
    folders = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    labs = {f"JUPYTERLAB_{kind}_DIR": str(folder / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    return folders | labs


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """A JupyterLab of our own: (its folder, its address)."""
    folder = tmp_path_factory.mktemp("lab")
    port, folders = free_port(), jupyter_folders(folder)
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # older versions take cells that are out of sight out of the page
    command = [sys.executable, "-m", "jupyterlab", *ALONE, "--ip=localhost", f"--port={port}",
               f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=t"]  # fmt: skip
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | folders)
        try:
            wait_for(f"http://localhost:{port}/api/status?token=t", server, folder / "log")
            yield folder, f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(20)


def wait_for(address, server, log):
    for _ in range(240):
        try:
            return urlopen(address).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.fixture
def run(lab, tab):
    """``run(*cells)``: a notebook of these cells opened in JupyterLab and run, until the last cell has its number."""
    folder, address = lab

    def opened(*cells, name="x", wait=90_000):
        path = folder / f"{name}.ipynb"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, path)
        return show(path.name, len(cells), wait)

    def show(file, count, wait=90_000, execute=True):
        tab.goto(f"{address}/lab/workspaces/{Path(file).stem}/tree/{file}?token=t&reset")
        tab.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        if execute:
            tab.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady", timeout=60_000)
            tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            prompts = ".jp-CodeCell .jp-InputPrompt"
            done = f"[...document.querySelectorAll('{prompts}')].filter(p => /\\[\\d+\\]/.test(p.textContent)).length"
            tab.wait_for_function(f"{done} >= {count}", timeout=wait)
            failed = tab.locator(
                ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
            ).all_inner_texts()
            assert not failed, failed
        return tab

    opened.show = show
    yield opened
    with urlopen(f"{address}/api/kernels?token=t") as answer:
        kernels = json.load(answer)
    for kernel in kernels:  # each holds half a gigabyte
        urlopen(Request(f"{address}/api/kernels/{kernel['id']}?token=t", method="DELETE")).close()
