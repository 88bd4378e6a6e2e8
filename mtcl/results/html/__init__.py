"""Runs as one self-contained HTML file: numbers, curves, pictures, configs. What it says is :mod:`..compare`'s.

``collect`` reads folders, ``figures`` makes the numbers that are drawn, ``pictures`` cuts panels into embedded tiles,
``document`` writes HTML around them; ``page.css`` and ``page.js`` go into the file as they are.
"""

from mtcl.results.html.collect import collect
from mtcl.results.html.document import document

__all__ = ["collect", "document"]
