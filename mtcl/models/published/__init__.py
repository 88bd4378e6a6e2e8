"""Convert published checkpoints of other codebases to state dicts of our models.

One module per method holds the rules from its authors' key names to ours. To add a method, write a module with a
``METHOD`` and list it below.
"""

from mtcl.models.published import diffusion_mtl, invpt, sak, taskprompter
from mtcl.models.published.translation import (
    Method,
    Rule,
    check_state_dict,
    read_published_checkpoint,
    translate_state_dict,
)

METHODS: dict[str, Method] = {
    method.name: method for method in (diffusion_mtl.METHOD, invpt.METHOD, sak.METHOD, taskprompter.METHOD)
}

__all__ = ["METHODS", "Method", "Rule", "check_state_dict", "read_published_checkpoint", "translate_state_dict"]
