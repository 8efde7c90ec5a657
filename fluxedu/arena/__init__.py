"""The arena: which model generates better images, by votes on pairs whose models are not named.

    from fluxedu import arena
    a = arena.Arena(["nano", "nano@4", "nano-base"], "votes.sqlite")
    arena.judge_votes(a, votes=60)               # the scene judge votes
    arena.booth(a)                               # you vote, with the keys left, right, and down for a tie
    print(a.ratings("overall").table())

A Bradley-Terry model turns votes into strengths: one model is preferred to another with probability
``sigmoid(strength - strength)``. Strengths are reported on the Elo scale, with intervals.
"""

from importlib import import_module

# name -> module; imported on first use, so that the command line starts quickly
_PUBLIC = {
    "AXES": "fluxedu.arena.votes",
    "Arena": "fluxedu.arena.match",
    "ArenaError": "fluxedu.errors",
    "Contestant": "fluxedu.arena.match",
    "Ratings": "fluxedu.arena.rating",
    "Votes": "fluxedu.arena.votes",
    "booth": "fluxedu.arena.server",
    "contestant": "fluxedu.arena.match",
    "create_server": "fluxedu.arena.server",
    "fit": "fluxedu.arena.rating",
    "judge_votes": "fluxedu.arena.match",
    "rate": "fluxedu.arena.rating",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu.arena has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
