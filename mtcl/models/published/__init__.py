"""Convert published checkpoints of other codebases to state dicts of our models.

One module per method holds the rules from its authors' key names to ours. To add a method, write a module with a
``METHOD`` and list it below.
"""

from mtcl.models.published import atrc, diffusion_mtl, invpt, mti_net, pad_net, sak, task_diffusion, taskprompter
from mtcl.models.published.translation import (
    Method,
    Rule,
    check_state_dict,
    read_published_checkpoint,
    translate_state_dict,
)

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (atrc, diffusion_mtl, invpt, mti_net, pad_net, sak, task_diffusion, taskprompter)
}

__all__ = ["METHODS", "Method", "Rule", "check_state_dict", "read_published_checkpoint", "translate_state_dict"]
