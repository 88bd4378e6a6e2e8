"""Reports: runs as one self-contained HTML file with table, curves, sweeps, images and settings.

:mod:`.collect` reads the folders, :mod:`.charts` computes the numbers that are drawn, :mod:`.images` cuts panels into
embedded tiles, :mod:`.page` writes the HTML; ``page.css`` and ``page.js`` are embedded unchanged.
"""

from mtcl.results.html.collect import collect
from mtcl.results.html.page import render_page

__all__ = ["collect", "render_page"]
