"""Rules for TaskPrompter.

Source: github.com/prismformore/Multi-Task-Transformer, TaskPrompter/models (taskprompter_wrapper.py, ViT).
"""

from collections.abc import Mapping

from torch import Tensor

from mtcl.models.published.translation import Method, Overrides, Rule
from mtcl.models.published.vit import VIT_RULES, get_vit_overrides


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """Return the number of blocks of the ViT."""
    return len({key.split(".")[2] for key in state if key.startswith("backbone.blocks.")})


def get_rules(state: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Return the rules; the prompts after the last block are never used, so its ``token_trans1`` is dropped."""
    last = count_blocks(state) - 1
    return (
        Rule("backbone.task_prompts", "prompts"),
        Rule(
            "backbone.pos_embed", "backbone.net.model.pos_embed", lambda embedding: embedding[:, 1:]
        ),  # no class token
        Rule("backbone.blocks.{n}.attn.token_trans.*", "channel_prompts.{n}.spread.*"),
        Rule(f"backbone.blocks.{last}.attn.token_trans1.*", None),
        Rule("backbone.blocks.{n}.attn.token_trans1.*", "channel_prompts.{n}.gather.*"),
        *VIT_RULES,
        Rule("backbone.fea_decode_spa.{n}.{task}.0.*", "levels.{n}.spatial.{task}.*"),
        Rule("backbone.fea_decode_chan.{n}.{task}.0.*", "levels.{n}.channel.{task}.*"),
        Rule("backbone.fea_fuse.{n}.{task}.*", "levels.{n}.fuse.{task}.*"),
        Rule("backbone.ctr_attn_conv.{n}.{task}.*", "levels.{n}.cross.{task}.*"),
        Rule("heads.{task}.mt_proj.*", "heads.{task}.*"),
        Rule("heads.{task}.linear_pred.*", "logits.{task}.*"),
    )


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    The number of windows can't be read from the weights: published are 1 for ViT-L on PASCAL-Context, the only one of
    that depth with cross-task reweighting, and 4 for all others.
    """
    vit = get_vit_overrides(state, size)
    fused = next(v for k, v in state.items() if k.startswith("backbone.fea_fuse.0.") and k.endswith(".0.weight"))
    crosses = any(key.startswith("backbone.ctr_attn_conv.") for key in state)
    return {
        "backbone": {"mean": vit["mean"], "std": vit["std"]},
        "decoder": {
            "size": list(size),
            "width": fused.shape[1] // 2,
            "head_width": fused.shape[0],
            "cross_task": crosses,
            "windows": 1 if crosses and count_blocks(state) == 24 else 4,
        },
    }


METHOD = Method(
    name="taskprompter",
    model="TaskPrompter",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # TaskPrompter/utils/config.py
    rules=get_rules,
    config_overrides=get_config_overrides,
)
