"""Run a script so that a user's mistake ends it with one sentence and exit code 1, as train.py does."""

import errno
import logging
import sys
from collections.abc import Callable

from mtcl.cli.terminal import EscapingFormatter, ensure_utf8, print_error, tolerate_closed_output
from mtcl.config.quoting import expand_tilde
from mtcl.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Run ``main()`` under ``if __name__ == "__main__":``, with ``~`` in the command's arguments expanded.

    A UserError or a full or read-only disk is printed as one sentence, exit code 1. When the output is closed, the work
    goes on.
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
            print_error(
                f"{where}: {error.strerror}; make room there or get the right to write, or choose another folder"
            )
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
