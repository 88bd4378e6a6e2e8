"""Rules for ATRC.

Source: github.com/brdav/atrc, src/model (pl_model.py, heads/relationalcontext.py, heads/attention.py,
heads/utils_heads.py, backbones/hrnet.py) and src/data/pl_data.py.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from mtcl.models.published.hrnet import count_channels, get_hrnet_overrides, get_hrnet_rules
from mtcl.models.published.translation import Method, Overrides, Rule, State

CONTEXT, TARGET = "head.atrc_module.cp_blocks.{task}.{other}", "decoder.refine.{task}.contexts.{other}"
SIDES = {"query_project": "query", "key_project": "key"}


def get_conv_rules(source: str, target: str) -> tuple[Rule, ...]:
    """Return the rules of a convolution with a batch norm."""
    return Rule(f"{source}.conv.*", f"{target}.0.*"), Rule(f"{source}.bn.*", f"{target}.1.*")


def get_projection_rules(side: str) -> tuple[Rule, ...]:
    """Return the rules of a context's queries or keys; the second layer of a global one has no ReLU (prepare)."""
    source, target = f"{CONTEXT}.{side}", f"{TARGET}.{SIDES[side]}"
    return (
        *get_conv_rules(f"{source}.0", f"{target}.0"),
        *get_conv_rules(f"{source}.1", f"{target}.1"),
        Rule(f"{source}.global.conv.*", f"{target}.1.*"),
        Rule(f"{source}.global.bn.*", f"{target}.2.*"),
    )


RULES = (
    *get_hrnet_rules("backbone."),
    *get_conv_rules("head.bottleneck.{task}", "decoder.initial.{task}"),
    *get_conv_rules("head.aux_conv.{task}", "decoder.auxiliary.{task}"),
    Rule("head.aux_logits.{task}.*", "decoder.labels.{task}.*"),
    *(rule for side in SIDES for rule in get_projection_rules(side)),
    *get_conv_rules(f"{CONTEXT}.value_project", f"{TARGET}.value"),
    *get_conv_rules("head.atrc_module.out_proj.{task}", "decoder.refine.{task}.merge"),
    *get_conv_rules("head.atrc_module.bottleneck.{task}.0", "decoder.refine.{task}.mix.0"),
    Rule("head.final_logits.{task}.*", "decoder.logits.{task}.*"),
    # Class weights and centres of normals, which only the losses use.
    Rule("criterion.*", None),
)


def prepare(state: State, names: Collection[str]) -> State:
    """Mark the second layers of global contexts, whose names are those of other kinds.

    The weights do not say which kind a context is: our model, built from a genotype, does.
    """
    pattern = re.compile(r"(head\.atrc_module\.cp_blocks\.(\w+)\.(\w+)\.(query|key)_project)\.1\.(.+)")
    marked: State = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is not None:
            source, task, other, side, rest = match.groups()
            if f"decoder.refine.{task}.contexts.{other}.{side}.2.weight" in names:
                key = f"{source}.global.{rest}"
        marked[key] = value
    return marked


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the backbone is no HRNet.
    """
    del size
    count_channels(state, "backbone.")
    return {"backbone": get_hrnet_overrides(), "decoder": {"stride": 4, "window": 9}}


METHOD = Method(
    name="atrc",
    model="ATRC",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # config/*/hrnet18/atrc.yaml
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
    prepare=prepare,
)
