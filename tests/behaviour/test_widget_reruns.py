"""Running the cell of an explorer again frees what the former run held; checked in a real kernel."""

import pytest
from jupyter_client.manager import start_new_kernel

MAKE = """
import gc, weakref, ipywidgets, numpy as np
from fluxedu.widgets.explorer import Explorer, Slider, View
from fluxedu.widgets.panels import Pixels

class Held(np.ndarray):
    pass

def make(held):
    draw = lambda step: View([Pixels("image", np.zeros((2, 2, 3), np.uint8) + int(held[step]))])
    return Explorer("a test", [Slider("step", "step", ["0", "1"])], draw)

refs = []
def new():
    held = np.zeros(10).view(Held)
    refs.append(weakref.ref(held))
    return make(held)

def alive():
    gc.collect()
    return [ref() is not None for ref in refs]
"""


@pytest.fixture(scope="module")
def run():
    manager, client = start_new_kernel()

    def execute(code: str, cell: str) -> str:
        message = client.session.msg("execute_request", {"code": code, "store_history": True, "stop_on_error": False})
        message["metadata"] = {"cellId": cell} if cell else {}
        client.shell_channel.send(message)
        printed = ""
        while True:
            reply = client.get_iopub_msg(timeout=60)
            if reply["parent_header"].get("msg_id") != message["header"]["msg_id"]:
                continue
            if reply["msg_type"] == "stream":
                printed += reply["content"]["text"]
            if reply["msg_type"] == "error":
                raise AssertionError(reply["content"]["evalue"])
            if reply["msg_type"] == "status" and reply["content"]["execution_state"] == "idle":
                return printed.strip()

    execute(MAKE, "first")
    yield execute
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("code", ["new()", "e = new(); e", "display(new()); new()"], ids=["last", "named", "two"])
def test_a_cell_run_again_frees_its_former_explorers(run, code):
    made = code.count("new()")
    run("refs.clear()", "setup")
    for _ in range(3):
        run(code, f"cell {code}")
    assert run("print(sum(alive()), len(refs))", "count") == f"{made} {3 * made}"


def test_an_explorer_shown_in_two_cells_lives_while_one_of_them_shows_it(run):
    run("refs.clear(); kept = new()", "setup")
    run("kept", "one")
    run("kept", "two")
    run("kept", "one")  # the same explorer again
    run("new()", "two")
    assert run("print(alive())", "count") == "[True, True]"
    run("del kept; new()", "one")
    assert run("print(alive())", "count") == "[False, True, True]"


def test_a_closed_explorer_says_so(run):
    run("refs.clear(); kept = new(); kept", "three")
    run("new()", "three")
    with pytest.raises(AssertionError, match="this explorer is closed, since its cell ran again"):
        run("kept.set(step=1)", "four")


def test_without_cell_ids_nothing_is_closed(run):
    run("refs.clear()", "setup")
    for _ in range(2):
        run("new()", "")
    assert run("print(alive())", "count") == "[True, True]"
