"""Why quality could not be measured."""


class QualityNotMeasured(Exception):
    """The message says what to do."""
