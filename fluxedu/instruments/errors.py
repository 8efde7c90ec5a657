"""What instruments complain of."""


class InstrumentError(ValueError):
    """An instrument was asked for something that cannot be; the sentence says what can."""


class AbsentError(InstrumentError):
    """A prompt does not say a word. While several prompts are encoded, another one may."""


class BudgetError(InstrumentError):
    """A recording would need more bytes than it may."""
