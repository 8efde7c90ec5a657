"""The wiring behind the map: complete, in the order of computation, and explained."""

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fluxedu as fe
from fluxedu.instruments.wiring import boxes, for_pages, wiring


@pytest.fixture(scope="module")
def nano():
    return wiring()


@pytest.mark.parametrize("model", [None, "dev", "schnell", "fill", "klein-4b"])
def test_every_site_has_one_box(model, nano):
    made = nano if model is None else wiring(model)
    found = Counter(box["site"] for box in boxes(made) if box["site"])
    assert found == Counter(site.name for site in fe.sites(model))
    ids = Counter(box["id"] for box in boxes(made))
    assert max(ids.values()) == 1


def test_every_box_is_explained(nano):
    package = Path(fe.__file__).parent
    shapes = {site.name: list(site.shape) for site in fe.sites()}
    files = {box["source"].partition(":")[0] for box in boxes(nano)}
    lines = {file: (package / file).read_text(encoding="utf-8").splitlines() for file in files}
    for box in boxes(nano):
        assert box["title"] and not re.search("[{}]", box["title"] + box["text"]), box["id"]
        assert box["text"].endswith(".") and 15 < len(box["text"]) < 240, box["id"]
        assert box["kind"] in ("text", "time", "flow", "image")
        file, _, line = box["source"].partition(":")
        code = lines[file][int(line) - 1]
        assert box["code"] and code.strip().startswith(box["code"]), box["id"]
        if box["site"] is None and "shows" in box:
            assert box["shows"] in shapes
    assert all(box["shape"] == shapes[box["site"]] for box in boxes(nano) if box["site"])


def test_every_formula_can_be_read(nano):
    used = {box["formula"] for box in boxes(nano)}
    assert used <= set(nano["formulas"])
    for name in used:
        formula = ElementTree.fromstring(nano["formulas"][name])  # well-formed
        assert formula.tag == "math" and "".join(formula.itertext()).strip(), name
        assert not formula.findall(".//merror")


def test_arrows_follow_the_order_of_computation(pipe, nano):
    """Along every arrow the values are recorded in this order in a real run."""
    order: list[str] = []
    with fe.record("*", "t5.*", "clip.*", "ae.decoder.*", "sample.*", reduce="summary", steps=0) as rec:
        pipe("a red circle", steps=1, progress=False)
        order = list(rec)
    place = {name: i for i, name in enumerate(order)}
    checked = 0
    for box in nano["boxes"]:
        groups = [box["inside"]] if "inside" in box else []
        while groups:
            group = groups.pop()
            name = group.get("b", "")
            group = nano["templates"][group["template"]] if "template" in group else group
            known = {inner["id"] for row in group["rows"] for inner in _flat(row)}
            for ends in group.get("flow", ()):
                assert set(ends) <= known, ends
                a, b = (end.replace("{b}", name) for end in ends)
                if a in place and b in place and ".mod" not in a:
                    checked += 1
                    assert place[a] <= place[b] or _is_split(a, b), (a, b)
            groups += [inner["inside"] for row in group["rows"] for inner in _flat(row) if "inside" in inner]
    assert checked > 200


def _flat(row):
    for cell in row:
        if "rows" in cell:
            for inner in cell["rows"]:
                yield from _flat(inner)
        else:
            yield cell


def _is_split(a, b):
    """A part that the code computes only for instruments, before or after the whole."""
    return b.endswith(("head_contribution", "attn_contribution", "mlp_contribution", "txt_out", ".out", ".x", ".added"))


def test_pages_without_python_have_the_same_wiring():
    """Else: python -m fluxedu.instruments.wiring > web/src/wiring.json"""
    stored = Path(__file__).parents[2] / "web" / "src" / "wiring.json"
    assert stored.read_text(encoding="utf-8") == for_pages()
