"""The error of this package."""


class DataError(ValueError):
    """A data set cannot be loaded or used. The message is one line: what is wrong, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # causes quoted from other libraries may span lines
