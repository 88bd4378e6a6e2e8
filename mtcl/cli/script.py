"""How a script ends: a user's mistake is one sentence and exit code 1, as in train.py."""

import errno
import logging
import sys
from collections.abc import Callable

from mtcl.cli.terminal import EscapingFormatter, ensure_utf8, print_error, tolerate_closed_output
from mtcl.config.quoting import expand_tilde
from mtcl.errors import UserError


def run(main: Callable[[], object]) -> None:
    """``main()``, from under ``if __name__ == "__main__":``, with ``~`` in the command's words replaced.

    A UserError, or a disk that refuses, is one sentence and exit code 1. Where nobody reads the output any longer, the
    work goes on.
    """
    ensure_utf8()
    sys.argv[1:] = map(expand_tilde, sys.argv[1:])
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter())
    with tolerate_closed_output():
        try:
            main()
        except UserError as error:
            print_error(str(error))
            sys.exit(1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            where = error.filename or "the output"
            print_error(f"{where}: {error.strerror}; make room and rights there, or choose another folder")
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def run_with_args(work: Callable[[list[str]], object], text: str | None) -> None:
    """``work`` of the command's words, or, where there are none or help is asked for, the script's own ``text``."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        run(lambda: print(text))
    else:
        run(lambda: work(sys.argv[1:]))
