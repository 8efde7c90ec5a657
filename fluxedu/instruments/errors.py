"""What instruments complain of."""


class InstrumentError(ValueError):
    """An instrument was asked for something that cannot be; the sentence says what can."""


class BudgetError(InstrumentError):
    """A recording would need more bytes than it may."""
