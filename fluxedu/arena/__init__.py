"""The arena: which model generates better images, by votes on pairs whose models are not named.

    from fluxedu import arena
    a = arena.Arena(["nano", "nano@4", "nano-base"], "votes.sqlite")
    arena.judge_votes(a, votes=60)               # the scene judge votes
    arena.booth(a)                               # you vote, with the keys left, right, and down for a tie
    print(a.ratings("overall").table())

A Bradley-Terry model turns votes into strengths: one model is preferred to another with probability
``sigmoid(strength - strength)``. Strengths are reported on the Elo scale, with intervals.
"""

from fluxedu.lazy import public_names

#: imported on first use, so that the command line starts quickly
_NAMES = {
    "votes": ["AXES", "Votes"],
    "match": ["Arena", "Contestant", "contestant", "judge_votes"],
    "fluxedu.errors": ["ArenaError"],
    "rating": ["Ratings", "fit", "rate"],
    "server": ["booth", "create_server"],
}
__getattr__, __dir__, __all__ = public_names(__name__, _NAMES)
