"""Look through a pickle without running it: what it names, and whether reading it would go on without end.

``torch.load(weights_only=True)`` runs no code of a stranger, but it calls what it allows with whatever numbers the file
gives: a file of 400 bytes can ask for gigabytes (``bytearray``, ``FloatTensor``), and a tuple that holds itself twice,
44 times over, is hashed for hours where it is a key. So only what a checkpoint of mtcl needs is let through.
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
OTHER_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # torch.save has none
MAX_TUPLE_DEPTH = 8  # of tuples in tuples


def validate_pickle(data: bytes, path: Path) -> None:
    """Raise ``UserError`` where a pickle names anything but tensors and containers, or nests tuples without end.

    Args:
        data: the pickle, of protocol 2 or so.
        path: the file it lies in, for the message.
    """
    stack: list[Any] = []  # how deep tuples are nested in each value; a mark is itself
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL" and ALLOWED.fullmatch(str(argument)) is None:
            raise UserError(
                f"checkpoint {path} names {escape_control_characters(str(argument))}; it may hold tensors and plain containers"
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
        taken = _take(stack, opcode)
        if name.endswith("TUPLE") or name.startswith("TUPLE"):
            depth = 1 + max(taken, default=0)
            if depth > MAX_TUPLE_DEPTH:
                raise UserError(f"checkpoint {path} nests tuples deeper than {MAX_TUPLE_DEPTH} levels")
        else:
            depth = 0
        stack += [pickletools.markobject if item is pickletools.markobject else depth for item in opcode.stack_after]


def _take(stack: list[Any], opcode: Any) -> list[int]:
    """Take from the stack what an operation takes; return its depths."""
    before = list(opcode.stack_before)
    taken: list[int] = []
    if pickletools.markobject in before:
        while (top := stack.pop()) is not pickletools.markobject:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    return taken + [stack.pop() for _ in before]
