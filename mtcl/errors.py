"""The exceptions for mistakes of a user, and how errors and text of others are shown."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input (a key, a value, a file), in one sentence that names it and says what to do.

    It may be raised anywhere. Only the command lines catch it: they print the sentence and exit with 1.
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


def find_similar(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the choices that a misspelt name may mean, the most similar first; capitals, - and _ do not count.

    Where none is similar, a name of three letters or more that begins one choice alone means that choice.

    >>> find_similar("mtinet", ["mti_net", "pad_net"]), find_similar("nyud13", ["nyud", "nyuv2_13"], count=2)
    (['mti_net'], ['nyud', 'nyuv2_13'])
    >>> find_similar("contr", ["contrastive", "none"]), find_similar("lr", ["weight"])
    (['contrastive'], [])

    Args:
        name: as it was typed.
        choices: what it can be.
        count: the largest number of choices to return.
        cutoff: the smallest similarity, 0 to 1, as difflib measures it.
    """
    by_name: dict[str, str] = {}
    for choice in choices:
        by_name.setdefault(_simplify(choice), choice)
    simple = _simplify(name)
    similar = [by_name[match] for match in difflib.get_close_matches(simple, by_name, n=count, cutoff=cutoff)]
    completed = [choice for match, choice in by_name.items() if len(simple) >= 3 and match.startswith(simple)]
    return similar or (completed if len(completed) == 1 else [])


def suggest(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return ``" (did you mean CHOICE?)"`` for a misspelt name; nothing where :func:`find_similar` has no choice.

    >>> suggest("pcgrad", ["CAGrad", "PCGrad"]), suggest("uncertainty", ["CAGrad", "PCGrad"])
    (' (did you mean PCGrad?)', '')
    """
    similar = find_similar(name, choices, count, cutoff)
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""


def _simplify(name: str) -> str:
    return re.sub("[_-]", "", name).lower()


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text without a full stop at its end, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "" if isinstance(error, str) else type(error).__name__


def describe_load_error(error: Exception) -> str:
    """Say in one line why ``torch.load`` refused a file, without its advice to run whatever code the file holds."""
    text = str(error).strip().split("\n")[0]
    if "weights_only" in text or "weights only" in text.lower() or type(error).__name__ == "BadZipFile":
        return "it is no file of torch.save, or holds more than tensors and plain containers"
    return f"{type(error).__name__}: {text}"


def escape_control_characters(text: str) -> str:
    r"""Replace characters that control a terminal by their escapes, such as ``\x1b``; keep every other alphabet.

    File names and texts in files of strangers may hold escape codes, line breaks or marks that change the direction
    of writing; printed unchanged, they could hide or forge the output of a command.

    >>> escape_control_characters("a\x1b[31mb\u202e"), escape_control_characters("für/深度 7")
    ('a\\x1b[31mb\\u202e', 'für/深度 7')
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Preempted(Exception):  # noqa: N818
    """Training has ended early at :attr:`step`, and its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step


class PeerLost(Exception):  # noqa: N818
    """Another process of this run has ended, so that this one can't go on; why, that one has said."""
