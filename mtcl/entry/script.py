"""How a script ends: a user's mistake is one sentence and exit code 1, as in train.py."""

import sys
from collections.abc import Callable

from mtcl.errors import UserError


def run(main: Callable[[], object]) -> None:
    """``main()``, from under ``if __name__ == "__main__":``."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
