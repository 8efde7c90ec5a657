"""The miniature: what it can draw (:data:`VOCABULARY`), its scenes, networks, tokenizers, weights, judge and exam."""

from pkgutil import iter_modules

from fluxedu.lazy import public_names

#: imported on first use, to keep ``fe.load`` light
_NAMES = {"vocabulary": ["VOCABULARY", "INSTRUCTION_WORDS", "unknown_words", "prompt_problem", "split_words"]}
__getattr__, __dir__, __all__ = public_names(__name__, _NAMES, [module.name for module in iter_modules(__path__)])
