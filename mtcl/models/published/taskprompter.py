"""TaskPrompter: github.com/prismformore/Multi-Task-Transformer, TaskPrompter/models (taskprompter_wrapper.py, ViT)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtcl.models.published.table import Method, Rule
from mtcl.models.published.vit import VIT, vit_settings


def depth(state: Mapping[str, Tensor]) -> int:
    """The number of the ViT's layers."""
    return len({key.split(".")[2] for key in state if key.startswith("backbone.blocks.")})


def table(state: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """The prompts that come out of the last layer are never used."""
    last = depth(state) - 1
    return (
        Rule("backbone.task_prompts", "prompts"),
        Rule(
            "backbone.pos_embed", "backbone.net.model.pos_embed", lambda embedding: embedding[:, 1:]
        ),  # no class token
        Rule("backbone.blocks.{n}.attn.token_trans.*", "channel_prompts.{n}.spread.*"),
        Rule(f"backbone.blocks.{last}.attn.token_trans1.*", None),
        Rule("backbone.blocks.{n}.attn.token_trans1.*", "channel_prompts.{n}.gather.*"),
        *VIT,
        Rule("backbone.fea_decode_spa.{n}.{task}.0.*", "levels.{n}.spatial.{task}.*"),
        Rule("backbone.fea_decode_chan.{n}.{task}.0.*", "levels.{n}.channel.{task}.*"),
        Rule("backbone.fea_fuse.{n}.{task}.*", "levels.{n}.fuse.{task}.*"),
        Rule("backbone.ctr_attn_conv.{n}.{task}.*", "levels.{n}.cross.{task}.*"),
        Rule("heads.{task}.mt_proj.*", "heads.{task}.*"),
        Rule("heads.{task}.linear_pred.*", "logits.{task}.*"),
    )


def settings(state: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """``decoder.windows`` leaves no trace in the weights: published are 1 for ViT-L on PASCAL-Context, which alone of
    that depth has weights between tasks, and 4 for all others."""
    vit = vit_settings(state, size)
    fused = next(v for k, v in state.items() if k.startswith("backbone.fea_fuse.0.") and k.endswith(".0.weight"))
    crosses = any(key.startswith("backbone.ctr_attn_conv.") for key in state)
    return {
        "backbone.mean": vit["backbone.mean"],
        "backbone.std": vit["backbone.std"],
        "decoder.size": list(size),
        "decoder.width": fused.shape[1] // 2,
        "decoder.head_width": fused.shape[0],
        "decoder.cross_task": crosses,
        "decoder.windows": 1 if crosses and depth(state) == 24 else 4,
    }


METHOD = Method(
    name="taskprompter",
    model="TaskPrompter",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # TaskPrompter/utils/config.py
    table=table,
    settings=settings,
)
