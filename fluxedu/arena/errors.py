"""What the arena complains of."""


class ArenaError(ValueError):
    """The arena was asked for something that cannot be; the sentence says what can."""
