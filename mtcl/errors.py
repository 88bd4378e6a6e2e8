"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave (a key, a value, a file): one sentence that names it and says what to do.

    Raised wherever the mistake is found. Only the entry points catch it: they print the sentence and exit with 1.
    """
