"""Contrastive multi-task dense prediction (after Yang, Ye, Xu, AAAI 2023).

Floors, lower never imports higher:
``losses``, ``metrics`` <- ``tasks`` <- ``data`` <- ``models`` <- ``contrastive`` <- ``training`` <- ``entry``
(train.py, evaluate.py, scripts).
"""

from mtcl.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
