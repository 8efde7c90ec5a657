"""No telemetry: with a model that ships, nothing here looks up an address or opens a connection.

Python calls an audit hook for every look-up, connection and URL, whichever library makes it. The hook is installed
before anything else, and a test shows that it works: it reports a deliberate connection.
"""

import json
import os
import subprocess
import sys

HOOK = """
import json, sys
events = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
                 "socket.bind", "urllib.Request", "http.client.connect"):
        events.append([event, repr(arguments)])
sys.addaudithook(hook)
"""
USE = """
import fluxedu as fe
from fluxedu import cli
from fluxedu.trace import page, stages
from typer.testing import CliRunner

pipe = fe.load()
small = {"steps": 2, "height": 32, "width": 32}
with fe.record("double.1.attn.map", reduce="head-mean") as seen:
    pipe("a red circle", **small)
assert "double.1.attn.map" in seen
page("a red circle", "", stages(pipe, "a red circle", **small)[1])
fe.sites(pipe)
for words in (["info", "dev"], ["judge", "--help"], ["sites", "gate"], ["arena", "--help"]):
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (words, result.output)

import fluxedu.plots, fluxedu.widgets, fluxedu.arena, fluxedu.sweep, fluxedu.nano, fluxedu.course, fluxedu.memory
from fluxedu.sweep import from_dict, run_sweep

run_sweep(from_dict({"prompts": ["a red circle"], "settings": {"steps": 1, "height": 32, "width": 32}}), sys.argv[1])
"""
DELIBERATE = """
import socket, urllib.request
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1).close()
except OSError:
    pass
try:
    urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)
except OSError:
    pass
"""


def addresses(code: str, *arguments: object) -> list[list[str]]:
    """The network events of a fresh Python process: (event, arguments), in order."""
    code = f"{HOOK}{code}\nprint('EVENTS', json.dumps(events))"
    # as a reader has it: nothing that a test or a machine may have set to keep the libraries offline
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "TELEMETRY" not in k and "TRACK" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("EVENTS ")[2])


def test_the_hook_sees_who_connects():
    found = addresses(DELIBERATE)
    assert {event for event, _ in found} >= {"socket.getaddrinfo", "socket.connect", "urllib.Request"}
    assert any("127.0.0.1" in details for _, details in found)


def test_no_connection_is_opened(tmp_path):
    """A picture, a recording, a trace, commands, a sweep."""
    assert addresses(USE, tmp_path / "out") == []
