"""InvPT: github.com/prismformore/Multi-Task-Transformer, InvPT/models (vit.py, transformer_decoder.py, invpt.py)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtcl.models.published.table import Method, Rule
from mtcl.models.published.vit import VIT, vit_settings

THEIRS = "multi_task_decoder"
STAGE, OURS = f"{THEIRS}.invpt.invpt_stages.{{n}}", "decoder.stages.{n}"
BLOCK = f"{STAGE}.blocks.0"

TABLE = (
    *VIT,
    Rule(f"{THEIRS}.preliminary_decoder.{{task}}.{{n}}.conv.*", "decoder.preliminary.{task}.{n}.0.*"),
    Rule(f"{THEIRS}.preliminary_decoder.{{task}}.{{n}}.bn1.*", "decoder.preliminary.{task}.{n}.1.*"),
    Rule(f"{THEIRS}.intermediate_head.{{task}}.*", "decoder.preliminary_logits.{task}.*"),
    Rule(f"{THEIRS}.invpt.mix_proj.{{task}}.0.*", "decoder.mix.{task}.*"),
    # Encoder maps. That of the first stage is computed and added to nothing.
    Rule(f"{THEIRS}.scale_embed.0.*", "decoder.skips.2.conv.*"),
    Rule(f"{THEIRS}.scale_embed.1.*", "decoder.skips.1.conv.*"),
    Rule(f"{THEIRS}.scale_embed.2.*", None),
    # UP: 0 is the upsampling, 1-3 and 4-6 are convolution, normalisation, ReLU.
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.1.*", f"{OURS}.up.{{task}}.0.0.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.2.*", f"{OURS}.up.{{task}}.0.1.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.4.*", f"{OURS}.up.{{task}}.1.0.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.5.*", f"{OURS}.up.{{task}}.1.1.*"),
    Rule(f"{BLOCK}.norm1.*", f"{OURS}.norm1.*"),
    Rule(f"{BLOCK}.norm2.*", f"{OURS}.norm2.*"),
    Rule(f"{BLOCK}.mlp.fc1.*", f"{OURS}.mlp.0.*"),
    Rule(f"{BLOCK}.mlp.fc2.*", f"{OURS}.mlp.2.*"),
    Rule(f"{BLOCK}.attn.conv_proj_q.{{index}}.conv.*", f"{OURS}.attention.shrink.{{task}}.0.*"),
    Rule(f"{BLOCK}.attn.conv_proj_q.{{index}}.bn.*", f"{OURS}.attention.shrink.{{task}}.1.*"),
    Rule(f"{BLOCK}.attn.proj_q.*", f"{OURS}.attention.query.*"),
    Rule(f"{BLOCK}.attn.proj_k.*", f"{OURS}.attention.key.*"),
    Rule(f"{BLOCK}.attn.proj_v.*", f"{OURS}.attention.value.*"),
    Rule(f"{BLOCK}.attn.proj.*", f"{OURS}.attention.out.*"),
    # The first stage has nothing to fuse its scores with.
    Rule(f"{THEIRS}.invpt.invpt_stages.0.blocks.0.attn.fuse_attn.*", None),
    Rule(f"{BLOCK}.attn.fuse_attn.*", f"{OURS}.attention.fuse.*"),
    Rule(f"{THEIRS}.invpt.norm_mts.{{n}}.*", "decoder.norms.{n}.*"),
    Rule(f"{THEIRS}.invpt.norm_mt.*", None),
    # The first stage has the final width already, and they leave its features as they are.
    Rule(f"{THEIRS}.invpt.redu_chan.0.*", None),
    Rule(f"{THEIRS}.invpt.redu_chan.{{n}}.{{index}}.*", "decoder.reduce.{n}.{task}.*"),
    Rule(f"{THEIRS}.invpt.mt_proj.{{task}}.{{n}}.*", "decoder.project.{task}.{n}.*"),
    Rule("heads.{task}.linear_pred.*", "decoder.logits.{task}.*"),
)


def settings(state: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    return {**vit_settings(state, size), "decoder.aggregate_first": False}


METHOD = Method(
    name="invpt",
    model="InvPT",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # InvPT/utils/config.py
    table=lambda state: TABLE,
    settings=settings,
)
