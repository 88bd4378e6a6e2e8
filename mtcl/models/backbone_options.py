"""The arguments of ``timm.create_model`` that a config may set: only those that describe the architecture.

A config may come from an untrusted checkpoint. timm's other arguments name files to unpickle (``checkpoint_path``),
addresses to download from and folders to write to (``pretrained``, ``pretrained_cfg``, ``pretrained_cfg_overlay``,
``cache_dir``), or callables. Arguments that are not listed here are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from mtcl.errors import ParameterError, find_similar

TRAINABLE = re.compile(r"full|frozen|lora|last_[1-9]\d{0,3}")
TRAINABLE_CHOICES = "full, frozen, lora or last_N (such as last_2)"
_NAMES = """
    act_layer always_partition attn_drop_rate attn_ratio attn_type avg_down base_width block_config
    block_reduce_first bn_eps bn_momentum bn_size cardinality channel_multiplier channels class_token conv_bias
    conv_mlp crpe_window depth depth_mult depth_multiplier depths dim_mul dims down_kernel_size downsamples
    drop_block_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim embed_dims expand_ratio
    feature_location ffn_ratio final_norm fix_init fix_stem focal_levels focal_windows global_attn_indexes
    global_block_counts global_pool global_pos_size
    growth_rate growth_rates head_dim head_mul heads hidden_sizes img_size
    init_values inner_dim intermediate_size kernel_size kernel_sizes key_dim layer_scale layer_scale_init_value
    layer_scale_init_values layers layerscale_value levels linear ls_init_value mask_unit_attn mask_unit_size
    merge_size mlp_bias mlp_ratio mlp_ratios neck_chans no_embed_class norm_eps norm_layer num_blocks num_heads
    num_init_features num_kv_heads num_levels num_reg_tokens output_stride pad_type partial_dim patch_drop_rate
    patch_kernel patch_norm patch_padding patch_size patch_sizes patch_stride pos_drop_rate pos_embed pos_embs
    pre_norm pretrained_window_sizes proj_bias proj_drop_rate q_pool q_stride qk_dim qk_norm qkv_bias qkv_fused
    ref_feat_shape reg_tokens rel_pos_dim rel_pos_type replace_stem_pool rope_grid_indexing rope_grid_offset
    rope_rotate_half rope_temperature rope_type scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm
    se_from_exp se_ratio sep_pos_embed serial_depths shared_rel_pos sr_ratios stage1 stage2 stage3 stage4 stages
    state_dim stem_chs stem_size stem_stride stem_type stem_width strict_img_size strides swiglu_align_to
    swiglu_mlp token_mixers transformer_depths use_abs_pos use_abs_pos_emb use_fc_norm use_grn use_layer_scale
    use_pos_emb use_pos_embed use_post_norm use_rel_pos use_rel_pos_bias use_rope use_rot_pos_emb
    use_shared_rel_pos_bias weight_init width width_factor width_mult width_multiplier widths window_ratio
    window_size window_sizes zero_init_last
"""
ARCHITECTURE = frozenset(_NAMES.split())
MAX_NUMBER = 100_000  # larger than any width
MAX_LIST_LENGTH = 32
MAX_BLOCKS = 256  # the sum of all numbers of blocks
# Arguments whose large values would take minutes to build, before any weight is compared: pattern -> largest value.
SMALL_ARGUMENTS = {
    r"stage\d|levels|depth_mult(iplier)?|width_mult(iplier)?|channel_multiplier|width_factor": 8,
    r".*(depth|layers|blocks|block_config|stages).*": 128,
    r".*window.*|kernel_sizes?|.*patch_sizes?": 128,
    r"img_size|ref_feat_shape|global_pos_size": 4096,
}
BLOCK_ARGUMENTS = re.compile(r".*(depths?|layers|blocks|block_config|stages)")
NAME = re.compile(r"[A-Za-z0-9_.-]{0,40}")  # of a layer, a padding, ...: no path and no URL


def check_backbone_kwargs(kwargs: Any) -> None:
    """Check that a backbone's ``kwargs`` are architecture arguments with bounded values.

    Args:
        kwargs: argument -> value for ``timm.create_model``, or None. A value is a number of at most
            :data:`MAX_NUMBER`, true, false, null, a short name, or a list or a mapping of these, at most three levels
            deep.

    Raises:
        ParameterError: names the first argument that is not.
    """
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise ParameterError("kwargs", f"={kwargs!r} must be a mapping {{argument: value}}, or null")
    for name, value in kwargs.items():
        if name not in ARCHITECTURE:
            similar = find_similar(str(name), ARCHITECTURE, cutoff=0.75)
            hint = f"did you mean {similar[0]}?" if similar else "weights have a key of their own"
            raise ParameterError(
                f"kwargs.{str(name)[:80]}", f" is not an architecture argument that may be set; {hint}"
            )
        largest = next(
            (largest for pattern, largest in SMALL_ARGUMENTS.items() if re.fullmatch(pattern, name)), MAX_NUMBER
        )
        if not _is_plain(value, largest, levels=3):
            raise ParameterError(
                f"kwargs.{name}",
                f"={str(value)[:80]} must be a number up to {largest}, true, false, null, a name, or a list or mapping "
                "of these",
            )
    blocks = sum(_sum(value) for name, value in kwargs.items() if BLOCK_ARGUMENTS.fullmatch(name))
    if blocks > MAX_BLOCKS:
        raise ParameterError("kwargs", f" ask for {blocks:g} blocks; at most {MAX_BLOCKS} can be built")


def _is_plain(value: Any, largest: int, levels: int) -> bool:
    """Return whether a value is a bounded number, a name, or a bounded nest of these."""
    if isinstance(value, Mapping):  # HRNet's stages
        names = all(isinstance(key, str) and NAME.fullmatch(key) for key in value)
        widths = [value[key] for key in value if key == "num_channels"]
        others = [value[key] for key in value if key != "num_channels"]
        return names and _is_plain(widths, MAX_NUMBER, levels) and _is_plain(others, largest, levels)
    if isinstance(value, list | tuple):
        return (
            levels > 0 and len(value) <= MAX_LIST_LENGTH and all(_is_plain(item, largest, levels - 1) for item in value)
        )
    if isinstance(value, str):
        return NAME.fullmatch(value) is not None
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= largest)


def _sum(value: Any) -> float:
    """Return the sum of the absolute numbers in a value and its lists."""
    if isinstance(value, list | tuple):
        return sum(map(_sum, value))
    return abs(value) if isinstance(value, int | float) else 0
