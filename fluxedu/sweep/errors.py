"""What a sweep complains of."""


class SweepError(ValueError):
    """A sweep that cannot be run as it is described; the message is one sentence."""
