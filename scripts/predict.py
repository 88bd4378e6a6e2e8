"""Run ``mtcl predict`` without installing the package."""

from mtcl.cli.main import main

if __name__ == "__main__":
    main("predict")
