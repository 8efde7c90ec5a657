"""The miniature: what it can draw (:data:`VOCABULARY`), its scenes, networks, tokenizers, weights, judge and exam."""

_VOCABULARY = ("VOCABULARY", "INSTRUCTION_WORDS", "unknown_words", "prompt_problem", "split_words")


def __getattr__(name: str):
    """The names of :mod:`fluxedu.nano.vocabulary`, imported on first use to keep ``fe.load`` light."""
    if name not in _VOCABULARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fluxedu.nano import vocabulary

    return getattr(vocabulary, name)
