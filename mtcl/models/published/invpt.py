"""Rules for InvPT.

Source: github.com/prismformore/Multi-Task-Transformer, InvPT/models (vit.py, transformer_decoder.py, invpt.py).
"""

from collections.abc import Mapping

from torch import Tensor

from mtcl.models.published.translation import Method, Overrides, Rule
from mtcl.models.published.vit import VIT_RULES, get_vit_overrides

SOURCE = "multi_task_decoder"
STAGE, TARGET = f"{SOURCE}.invpt.invpt_stages.{{n}}", "decoder.stages.{n}"
BLOCK = f"{STAGE}.blocks.0"

RULES = (
    *VIT_RULES,
    Rule(f"{SOURCE}.preliminary_decoder.{{task}}.{{n}}.conv.*", "decoder.preliminary.{task}.{n}.0.*"),
    Rule(f"{SOURCE}.preliminary_decoder.{{task}}.{{n}}.bn1.*", "decoder.preliminary.{task}.{n}.1.*"),
    Rule(f"{SOURCE}.intermediate_head.{{task}}.*", "decoder.preliminary_logits.{task}.*"),
    Rule(f"{SOURCE}.invpt.mix_proj.{{task}}.0.*", "decoder.mix.{task}.*"),
    # Encoder maps. That of the first stage is computed and not used.
    Rule(f"{SOURCE}.scale_embed.0.*", "decoder.skips.2.conv.*"),
    Rule(f"{SOURCE}.scale_embed.1.*", "decoder.skips.1.conv.*"),
    Rule(f"{SOURCE}.scale_embed.2.*", None),
    # UP: 0 is the upsampling, 1-3 and 4-6 are convolution, normalisation, ReLU.
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.1.*", f"{TARGET}.up.{{task}}.0.0.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.2.*", f"{TARGET}.up.{{task}}.0.1.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.4.*", f"{TARGET}.up.{{task}}.1.0.*"),
    Rule(f"{STAGE}.patch_embed.{{index}}.proj.5.*", f"{TARGET}.up.{{task}}.1.1.*"),
    Rule(f"{BLOCK}.norm1.*", f"{TARGET}.norm1.*"),
    Rule(f"{BLOCK}.norm2.*", f"{TARGET}.norm2.*"),
    Rule(f"{BLOCK}.mlp.fc1.*", f"{TARGET}.mlp.0.*"),
    Rule(f"{BLOCK}.mlp.fc2.*", f"{TARGET}.mlp.2.*"),
    Rule(f"{BLOCK}.attn.conv_proj_q.{{index}}.conv.*", f"{TARGET}.attention.shrink.{{task}}.0.*"),
    Rule(f"{BLOCK}.attn.conv_proj_q.{{index}}.bn.*", f"{TARGET}.attention.shrink.{{task}}.1.*"),
    Rule(f"{BLOCK}.attn.proj_q.*", f"{TARGET}.attention.query.*"),
    Rule(f"{BLOCK}.attn.proj_k.*", f"{TARGET}.attention.key.*"),
    Rule(f"{BLOCK}.attn.proj_v.*", f"{TARGET}.attention.value.*"),
    Rule(f"{BLOCK}.attn.proj.*", f"{TARGET}.attention.out.*"),
    # The first stage has no previous scores to fuse.
    Rule(f"{SOURCE}.invpt.invpt_stages.0.blocks.0.attn.fuse_attn.*", None),
    Rule(f"{BLOCK}.attn.fuse_attn.*", f"{TARGET}.attention.fuse.*"),
    Rule(f"{SOURCE}.invpt.norm_mts.{{n}}.*", "decoder.norms.{n}.*"),
    Rule(f"{SOURCE}.invpt.norm_mt.*", None),
    # The first stage has the final width already; its features are not reduced.
    Rule(f"{SOURCE}.invpt.redu_chan.0.*", None),
    Rule(f"{SOURCE}.invpt.redu_chan.{{n}}.{{index}}.*", "decoder.reduce.{n}.{task}.*"),
    Rule(f"{SOURCE}.invpt.mt_proj.{{task}}.{{n}}.*", "decoder.project.{task}.{n}.*"),
    Rule("heads.{task}.linear_pred.*", "decoder.logits.{task}.*"),
)


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs."""
    return {"backbone": get_vit_overrides(state, size), "decoder": {"aggregate_first": False}}


METHOD = Method(
    name="invpt",
    model="InvPT",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # InvPT/utils/config.py
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
)
