"""How long an explorer takes from a move to the picture, in a browser: 50 moves each, by the mouse or a key.

A figure for a quiet machine, so it is part of `make bench`; elsewhere it is left out.
"""

import os

import pytest
from test_explorers import BEGIN

BAR = 100  # ms, of 95 moves in 100
MOVES = 50

#: how it is made, what is moved
MOVED = {
    "architecture": ("widgets.architecture(pipe, prompt, progress=False)", "g[tabindex='0']"),
    "attention": ("widgets.attention(pipe, prompt, progress=False)", "canvas:not([data-pointer=''])"),
    "grid": ("widgets.grid(pipe, prompt, progress=False)", "canvas:not([data-pointer=''])"),
    "heads": ("widgets.heads(pipe, prompt, steps=2)", "canvas:not([data-pointer=''])"),
    "latents": ("widgets.latents(pipe, prompt, progress=False)", "canvas:not([data-pointer=''])"),
    "modulation": ("widgets.modulation(pipe, prompt)", "canvas:not([data-pointer=''])"),
    "trajectory": ("widgets.trajectory(pipe, prompt, progress=False)", "input"),
    "velocity": (
        "widgets.velocity(pipe, [prompt, 'a green star'], seeds=5, steps=6, progress=False)",
        ".drawing:not([data-pointer=''])",
    ),
}


@pytest.mark.skipif("FLUXEDU_LATENCY" not in os.environ, reason="a measurement, for `make bench` on a quiet machine")
@pytest.mark.parametrize("name", MOVED)
def test_50_moves(run, name, noted):
    made, what = MOVED[name]
    tab = run(BEGIN, made, name=f"latency-{name}")
    part = tab.locator(".fluxedu").locator(what).first
    part.wait_for()
    tab.evaluate(
        """() => {
          window.took = [];
          document.querySelector(".fluxedu").addEventListener("fluxedu:answered",
            (e) => window.took.push(e.detail.milliseconds));
        }"""
    )
    part.focus()
    keys = ["ArrowRight"] * 4 + ["ArrowDown"] + ["ArrowLeft"] * 4 + ["ArrowUp"]
    for i in range(150):  # at an edge some do not move
        if tab.evaluate("window.took.length") >= MOVES:
            break
        tab.keyboard.press(keys[i % len(keys)])
        tab.wait_for_timeout(250)
    took = sorted(tab.evaluate("window.took")[:MOVES])
    assert len(took) == MOVES
    p95 = took[int(0.95 * MOVES)]
    noted(f"latency, {name}", {"moves": MOVES, "median_ms": took[MOVES // 2], "p95_ms": p95})
    print(f"\n{name}: {len(took)} moves, median {took[len(took) // 2]:.0f} ms, 95 % within {p95:.0f} ms")
    assert p95 <= BAR


@pytest.mark.skipif("FLUXEDU_LATENCY" not in os.environ, reason="a measurement, for `make bench` on a quiet machine")
@pytest.mark.parametrize("rate", [6, 12])
def test_explorers_appear_and_answer_on_a_slow_machine(run, tab, rate):
    """With a processor 6 and 12 times as slow as this one."""
    session = tab.context.new_cdp_session(tab)
    session.send("Emulation.setCPUThrottlingRate", {"rate": rate})
    names = ("attention", "latents", "trajectory")
    run(BEGIN, *(MOVED[name][0] for name in names), name=f"slow-{rate}", wait=200_000)
    tab.wait_for_function("document.querySelectorAll('.fluxedu .caption').length === 3", timeout=120_000)
    session.send("Emulation.setCPUThrottlingRate", {"rate": 1})
    tab.wait_for_function("[...document.querySelectorAll('img.fluxedu-still')].every((image) => image.hidden)")
    for root in tab.locator(".fluxedu").all():
        before = root.locator(".caption").inner_text()
        root.locator("input[type='range']").first.press("ArrowRight")
        root.locator(".caption", has_not_text=before).wait_for(timeout=20_000)
