"""How a script ends: a user's mistake is one sentence and exit code 1, as in train.py."""

import errno
import sys
from collections.abc import Callable
from io import TextIOWrapper

from mtcl.errors import UserError, printable


def run(main: Callable[[], object]) -> None:
    """``main()``, from under ``if __name__ == "__main__":``."""
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "the output"
        print(
            f"error: {where}: {error.strerror}; make room and rights there, or choose another folder", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_words(work: Callable[[list[str]], object], text: str | None) -> None:
    """``work`` of the command's words, or, where there are none or help is asked for, the script's own ``text``."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(text)
    else:
        run(lambda: work(words))
