"""Published checkpoints of other codebases -> state dicts of our models.

One module per method: a table from its authors' key names to ours. A further method is a module with a ``METHOD`` of
its own, listed below.
"""

from mtcl.models.published import invpt, taskprompter
from mtcl.models.published.table import Method, Rule, check_state_dict, read_published_checkpoint, translate_state_dict

METHODS: dict[str, Method] = {method.name: method for method in (invpt.METHOD, taskprompter.METHOD)}

__all__ = [
    "METHODS",
    "Method",
    "Rule",
    "check_state_dict",
    "read_published_checkpoint",
    "translate_state_dict",
]
