"""Scan a pickle without running it: what it names, and whether reading it would take forever.

``torch.load(weights_only=True)`` runs no foreign code, but it calls what it allows with any numbers that the file
gives: a file of 400 bytes can ask for gigabytes (``bytearray``, ``FloatTensor``), and a tuple that holds itself twice,
44 times over, is hashed for hours where it is a key. So only what a checkpoint of mtcl needs is allowed.
"""

import pickletools
import re
from pathlib import Path
from typing import Any

from mtcl.errors import UserError, escape_control_characters

ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch\.storage UntypedStorage"
    r"|torch (Float|Double|Half|BFloat16|Byte|Char|Short|Int|Long|Bool|ComplexFloat|ComplexDouble)Storage|torch Size"
)
OTHER_CALLS = (
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
)  # not written by torch.save
MAX_TUPLE_DEPTH = 8  # of tuples in tuples


def validate_pickle(data: bytes, path: Path) -> None:
    """Refuse a pickle that names anything but tensors and containers, or nests tuples too deeply.

    Args:
        data: the pickle, as torch.save writes it (protocol 2).
        path: the file it comes from, for the message.

    Raises:
        UserError: the pickle is refused.
    """
    stack: list[Any] = []  # how deep tuples are nested in each value; a mark is itself
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL" and ALLOWED.fullmatch(str(argument)) is None:
            raise UserError(
                f"checkpoint {path} names {escape_control_characters(str(argument))}; it may hold tensors and plain "
                "containers"
            )
        if name in OTHER_CALLS:
            raise UserError(f"checkpoint {path} makes objects of classes; it may hold tensors and plain containers")
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = stack[-1]
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
            continue
        operands = _pop_operands(stack, opcode)
        if name.endswith("TUPLE") or name.startswith("TUPLE"):
            depth = 1 + max(operands, default=0)
            if depth > MAX_TUPLE_DEPTH:
                raise UserError(f"checkpoint {path} nests tuples deeper than {MAX_TUPLE_DEPTH} levels")
        else:
            depth = 0
        stack += [pickletools.markobject if item is pickletools.markobject else depth for item in opcode.stack_after]


def _pop_operands(stack: list[Any], opcode: Any) -> list[int]:
    """Remove an operation's operands from the stack; return their depths."""
    expected = list(opcode.stack_before)
    depths: list[int] = []
    if pickletools.markobject in expected:
        while (top := stack.pop()) is not pickletools.markobject:
            depths.append(top)
        expected = expected[: expected.index(pickletools.markobject)]
    return depths + [stack.pop() for _ in expected]
