"""Run ``python -m mtcl COMMAND ...``, which is ``mtcl COMMAND ...``; for torchrun and the processes of a sweep."""

from mtcl.cli.main import main

if __name__ == "__main__":
    main()
