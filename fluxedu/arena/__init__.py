"""The arena: which model draws better, by votes on pairs of pictures whose makers are not named.

    from fluxedu import arena
    a = arena.Arena(["nano", "nano@4", "nano-base"], "votes.sqlite")
    arena.judged(a, votes=60)                    # the judge of the scene world votes
    arena.booth(a)                               # you vote: the keys are left, right, and down for the same
    print(a.ratings("overall").table())

Votes become strengths by the model of Bradley and Terry: the better of two wins with probability
``sigmoid(strength - strength)``. They are reported on the Elo scale, with intervals.
"""

from importlib import import_module

# name -> where it lives; imported when first asked for, so that the command line stays light
_PUBLIC = {
    "AXES": "fluxedu.arena.axes",
    "Arena": "fluxedu.arena.match",
    "ArenaError": "fluxedu.errors",
    "Contestant": "fluxedu.arena.contestants",
    "Ratings": "fluxedu.arena.rating",
    "Votes": "fluxedu.arena.votes",
    "booth": "fluxedu.arena.widget",
    "contestant": "fluxedu.arena.contestants",
    "fit": "fluxedu.arena.rating",
    "judged": "fluxedu.arena.judges",
    "rated": "fluxedu.arena.rating",
    "serving": "fluxedu.arena.server",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu.arena has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
