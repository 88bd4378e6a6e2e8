"""Rules for DiffusionMTL, the diffusion of features.

Source: github.com/prismformore/DiffusionMTL, models (resnet.py, diffusion_net.py, diffusion/mtdnet.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.decoders.diffusion_mtl import DiffusionProcess
from mtcl.models.published.translation import Method, Overrides, Rule

# The tables of the diffusion process (MTDNet.register_schedule), which follow from the number of steps.
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
SOURCE = "diffusion_model.denoiser"
BLOCK, TARGET = f"{SOURCE}.crossblocks.{{n}}", "decoder.denoiser.blocks.{n}"

RULES = (
    Rule("backbone.fc.*", None),
    Rule("backbone.*", "backbone.net.*"),
    Rule("backbone_embed.*", "decoder.shared.*"),
    Rule("preliminary_dec.{task}.*", "decoder.initial.{task}.*"),
    Rule("preliminary_head.{task}.0.*", "decoder.initial_logits.{task}.*"),
    Rule("diffusion_model.pred_combinator.out_layer.*", "decoder.condition.*"),
    Rule(f"{BLOCK}.norm1.*", f"{TARGET}.query_norm.*"),
    Rule(f"{BLOCK}.norm2.*", f"{TARGET}.mlp_norm.*"),
    Rule(f"{BLOCK}.norm_kv.*", f"{TARGET}.source_norm.*"),
    Rule(f"{BLOCK}.norm2_kv.*", f"{TARGET}.source_mlp_norm.*"),
    Rule(f"{BLOCK}.attn.q.*", f"{TARGET}.query.*"),
    Rule(f"{BLOCK}.attn.kv.*", f"{TARGET}.key_value.*"),
    Rule(f"{BLOCK}.attn.proj.*", f"{TARGET}.out.*"),
    Rule(f"{BLOCK}.mlp.*", f"{TARGET}.mlp.*"),
    Rule(f"{BLOCK}.mlp_kv.*", f"{TARGET}.source_mlp.*"),
    Rule(f"{SOURCE}.pre_layer.{{task}}.*", "decoder.denoiser.embed.{task}.*"),
    Rule(f"{SOURCE}.t_embedder.mlp.{{n}}.*", "decoder.denoiser.time.{n}.*"),
    Rule(f"{SOURCE}.task_heads.{{task}}.*", "decoder.denoiser.heads.{task}.*"),
    Rule(f"{SOURCE}.final_task_heads.{{task}}.linear_pred.*", "decoder.logits.{task}.*"),
    *(Rule(f"diffusion_model.{name}", None) for name in TABLES),
)


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the file's variances of the noise are not those of the public code, which our decoder has.
    """
    del size
    table = state.get("diffusion_model.sqrt_one_minus_alphas_cumprod")
    if table is None:  # a file without the tables, which follow from the number of steps
        return {"backbone": {}, "decoder": {}}
    if not torch.allclose(table.float(), DiffusionProcess(len(table)).sqrt_noise, rtol=1e-4):
        raise UserError(
            "the checkpoint's diffusion_model.sqrt_one_minus_alphas_cumprod is not that of the public code for "
            f"{len(table)} steps; import a checkpoint that was trained with the public schedule of noise"
        )
    return {"backbone": {}, "decoder": {"steps": len(table)}}


METHOD = Method(
    name="diffusion_mtl",
    model="DiffusionMTL",
    tasks=("semseg", "depth", "human_parts", "sal", "normals", "edge"),  # utils/config.py
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
)
