"""The one exception that a user's mistake raises, and how text from elsewhere is shown."""


class UserError(Exception):
    """A mistake in what the user gave (a key, a value, a file): one sentence that names it and says what to do.

    Raised wherever the mistake is found. Only the entry points catch it: they print the sentence and exit with 1.
    """


class ParameterError(UserError):
    """A parameter of a constructor or function has a value that it cannot have.

    Args:
        parameter: name of the parameter, which the config floor completes to the key that the user typed.
        problem: the sentence after the name, with the value and what to do: ``"=0 must be at least 1"``.
    """

    def __init__(self, parameter: str, problem: str):
        super().__init__(f"{parameter}{problem}")
        self.parameter, self.problem = parameter, problem


def describe_load_error(error: Exception) -> str:
    """Tell in a line why ``torch.load`` took no file, without its advice to run whatever code is in there."""
    text = str(error).strip().split("\n")[0]
    if "weights_only" in text or "weights only" in text.lower() or type(error).__name__ == "BadZipFile":
        return "it is no file of torch.save, or holds more than tensors and plain containers"
    return f"{type(error).__name__}: {text}"


def escape_control_characters(text: str) -> str:
    r"""Replace characters that control a terminal by their escapes, such as ``\x1b``; keep every other alphabet.

    Names of files and texts in files of strangers may hold escape codes, line breaks or marks that turn the direction
    of writing; printed as they are, they could hide or forge what a command says.

    >>> printable("a\x1b[31mb\u202e"), printable("für/深度 7")
    ('a\\x1b[31mb\\u202e', 'für/深度 7')
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
