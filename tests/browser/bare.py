"""Explorers on a page without Jupyter: each widget has its own copy of the script, as anywidget gives it, and moves are
answered by the explorer in this process.
"""

import base64
import json
from pathlib import Path

from fluxedu.widgets import explorer as module

STATIC = Path(module.__file__).parent / "static"
TRAITS = ("title", "instruction", "controls", "tries", "play", "data", "first", "state", "view", "still")

MODEL = """
window.revive = (text) => JSON.parse(text, (_, value) => {
  if (typeof value?.bytes64 !== "string") return value;
  return new DataView(Uint8Array.from(atob(value.bytes64), (c) => c.charCodeAt(0)).buffer);
});
window.mount = async (index, traits, script) => {
  const values = revive(traits), listeners = {};
  const model = {
    get: (name) => values[name],
    set: (name, value) => (values[name] = value),
    on: (name, call) => (listeners[name] ??= []).push(call),
    off: (name, call) => (listeners[name] = (listeners[name] ?? []).filter((c) => c !== call)),
    save_changes: async () => {
      values.view = revive(await answer(index, JSON.stringify(values.state)));
      for (const call of listeners["change:view"] ?? []) call();
    },
  };
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const el = document.getElementById("page").appendChild(document.createElement("div"));
  await widget.render({ model, el });
};
"""

PAGE = """<!doctype html><html lang="en"><head><title>Explorers</title>
<meta name="viewport" content="width=device-width"><style>:root { color-scheme: light dark }
body { margin: 12px; font: 16px sans-serif; background: Canvas; color: CanvasText }
CSS</style></head><body><main id="page"><h1>Explorers</h1></main></body></html>"""


SHOWN = {}  # page -> its explorers


def packed(value):
    """JSON of a message, with bytes in base 64."""
    return json.dumps(value, default=lambda b: {"bytes64": base64.b64encode(bytes(b)).decode()})


def mount(tab, *explorers):
    """Show ``explorers`` below each other on a page of their own."""

    def answer(index, state):
        SHOWN[tab][index].state = json.loads(state)
        return packed(SHOWN[tab][index].view)

    if tab not in SHOWN:
        tab.expose_function("answer", answer)
    SHOWN[tab] = explorers
    tab.set_content(PAGE.replace("CSS", (STATIC / "explorer.css").read_text(encoding="utf-8")))
    tab.add_script_tag(content=MODEL)
    script = (STATIC / "explorer.js").read_text(encoding="utf-8")
    for index, explorer in enumerate(explorers):
        traits = {name: getattr(explorer, name) for name in TRAITS}
        tab.evaluate("([i, traits, script]) => mount(i, traits, script)", [index, packed(traits), script])
    return tab
