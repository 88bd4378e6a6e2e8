"""Rules for TaskDiffusion, the variant without MLoRE.

Source: github.com/YuqiYang213/TaskDiffusion, models (TaskDiffusion_wrapper.py, transformers/TaskDiffusion_baseline.py,
transformers/TaskDiffusion_head.py).
"""

from collections.abc import Mapping

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.translation import Method, Overrides, Rule
from mtcl.models.published.vit import get_vit_overrides

PYRAMID = "heads.fpn_encoder"


def drop_class_token(embedding: Tensor) -> Tensor:
    """Return a position embedding (1, N, C) of patches from one (1, 1 + N, C): the published ViT has no class token."""
    return embedding[:, 1:]


def list_timed_rules(source: str, target: str, has_second: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a timed convolution, or of a block of it and a second convolution."""
    timed = f"{target}.timed" if has_second else target
    rules = (
        Rule(f"{source}.conv_1.*", f"{timed}.conv.*"),
        Rule(f"{source}.norm.*", f"{timed}.norm.*"),
        Rule(f"{source}.time_mlp.1.*", f"{timed}.time.1.*"),
    )
    return (*rules, Rule(f"{source}.conv_2.*", f"{target}.conv.*")) if has_second else rules


RULES = (
    Rule("backbone.pos_embed", "backbone.net.model.pos_embed", drop_class_token),
    *(Rule(f"backbone.{name}", f"backbone.net.model.{name}") for name in ("patch_embed.proj.*", "blocks.{n}.*")),
    Rule("backbone.norm.*", "backbone.net.model.norm.*"),
    Rule("backbone.fea_fuse.{n}.*", "decoder.project.{n}.*"),
    Rule(f"{PYRAMID}.feat_task.{{n}}.{{task}}.*", "decoder.task_maps.{n}.{task}.*"),
    Rule("heads.embedding_tables.{task}.*", "decoder.encoder.embed.{task}.*"),
    Rule("heads.invalid_embedding_tables.{task}.weight", "decoder.encoder.void.{task}", lambda table: table[0]),
    Rule("heads.embed_all.*", "decoder.encoder.merge.*"),
    Rule("heads.time_mlp.0.weights", "decoder.time.0.frequencies"),
    Rule("heads.time_mlp.{n}.*", "decoder.time.{n}.*"),
    Rule("heads.transforms.conv_transforms.{n}.*", "decoder.condition.{n}.*"),
    *list_timed_rules(f"{PYRAMID}.share_fpn.fpn_conv.{{n}}.{{m}}", "decoder.interactions.{n}.shared.{m}"),
    *list_timed_rules(f"{PYRAMID}.mask_task.{{n}}", "decoder.interactions.{n}.gates", has_second=False),
    *list_timed_rules(
        f"{PYRAMID}.specific_head.{{n}}.{{task}}", "decoder.interactions.{n}.heads.{task}", has_second=False
    ),
    *list_timed_rules(f"{PYRAMID}.fpn_mask.{{task}}", "decoder.level_weights.{task}"),
    *list_timed_rules("heads.encoders.{n}.{task}", "decoder.refine.{n}.{task}"),
    Rule("heads.pred_heads.{task}.*", "decoder.logits.{task}.*"),
    Rule("heads.aux_heads.{task}.0.conv_1.*", "decoder.initial.{task}.layers.0.*"),
    Rule("heads.aux_heads.{task}.0.norm.*", "decoder.initial.{task}.layers.1.*"),
    Rule("heads.aux_heads.{task}.0.conv_2.*", "decoder.initial.{task}.layers.3.*"),
    Rule("heads.aux_heads.{task}.0.conv_3.*", "decoder.initial.{task}.shortcut.*"),
    Rule("heads.aux_heads.{task}.1.*", "decoder.initial_logits.{task}.*"),
)


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the file is of the variant with MLoRE, or its ViT was made for another ``size`` (height, width).
    """
    if any(".router_1." in key for key in state):
        raise UserError("the checkpoint is of TaskDiffusion with MLoRE, which is not built here; give one without")
    backbone = get_vit_overrides(state, size)
    # Without a class token timm refuses to pool by it; an empty name pools nothing, and keeps the final norm.
    backbone["kwargs"] |= {"class_token": False, "global_pool": ""}
    fused = state.get("backbone.fea_fuse.0.weight")
    decoder = {} if fused is None else {"width": fused.shape[0]}
    numbers = [int(key.split(".")[2]) for key in state if key.startswith("heads.encoders.")]
    return {"backbone": backbone, "decoder": decoder | ({"blocks": max(numbers) + 1} if numbers else {})}


METHOD = Method(
    name="task_diffusion",
    model="TaskDiffusion",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # utils/config.py
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
)
