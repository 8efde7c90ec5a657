"""axe-core, which finds faults of accessibility. Its script (version 4, MPL-2.0, unchanged) lies next to this file."""

import gzip
from pathlib import Path

SCRIPT = gzip.decompress((Path(__file__).parent / "axe.min.js.gz").read_bytes()).decode()


def complaints(tab, what="html"):
    """What axe finds in the elements of this CSS selector: violations of any rule, and ids that it is not sure of."""
    if not tab.evaluate("'axe' in window"):
        tab.add_script_tag(content=SCRIPT)
    found = tab.evaluate("(what) => axe.run(what)", what)
    unsure = [rule for rule in found["incomplete"] if "id" in rule["id"].split("-") or "label" in rule["id"]]
    return [
        f"{rule['id']}: {node['html'][:160]} ({(node['any'] + node['all'] + node['none'])[0]['message']})"
        for rule in [*found["violations"], *unsure]
        for node in rule["nodes"]
    ]
