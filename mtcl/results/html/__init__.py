"""Runs as one self-contained HTML file: numbers, curves, pictures, configs. What it says is :mod:`..compare`'s.

``collect`` reads folders, ``figures`` makes the numbers that are drawn, ``pictures`` cuts panels into embedded tiles,
``document`` writes HTML around them; ``page.css`` and ``page.js`` go into the file as they are.
"""

from mtcl.entry.page.collect import collect
from mtcl.entry.page.document import document

__all__ = ["collect", "document"]
