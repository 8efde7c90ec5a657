"""Short runs of a tiny pipeline, and how far two values are apart: what tests of instruments have in common."""

from contextlib import ExitStack

PROMPT, OTHER = "a red circle left of a blue square", "a big green triangle"
MAP = "double.1.attn.map"


def draw(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **{"progress": False, "steps": 3, **options})


def latents(pipe, prompt=PROMPT, **options):
    return draw(pipe, prompt, **options).latents


def under(pipe, *contexts, **options):
    """The latents of a run inside the contexts."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return latents(pipe, **options)


def off(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())


def relative(a, b):
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())
