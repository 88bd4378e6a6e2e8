"""Run ``mtcl export`` without installing the package."""

from mtcl.cli.main import main

if __name__ == "__main__":
    main("export")
