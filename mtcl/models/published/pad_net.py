"""Rules for PAD-Net on HRNet, in the version of MTI-Net's authors.

Source: github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, models (padnet.py, seg_hrnet.py).
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.hrnet import (
    add_background_logits,
    count_channels,
    get_hrnet_overrides,
    get_hrnet_rules,
    join_messages,
    split_fusion,
)
from mtcl.models.published.mti_net import check_auxiliary_tasks
from mtcl.models.published.translation import Method, Overrides, Rule, State

INITIAL, DECODER = "initial_task_prediction_heads", "decoder"

RULES = (
    *get_hrnet_rules("backbone.0."),
    Rule("backbone.1.last_layer.0.{n}.weight", "decoder.fusion.project.{n}.weight"),
    Rule("backbone.1.last_layer.1.*", "decoder.fusion.norm.*"),
    Rule(f"{INITIAL}.layers.{{task}}.*", "decoder.initial.{task}.*"),
    Rule(f"{INITIAL}.conv_out.{{task}}.*", "decoder.initial_logits.{task}.*"),
    Rule(
        "multi_modal_distillation.self_attention.{task}.{other}.weight",
        "decoder.distillation.messages.{task}.{other}.0.weight",
    ),
    # Two bottlenecks and the logits.
    Rule("heads.{task}.2.*", "decoder.logits.{task}.*"),
    Rule("heads.{task}.{n}.*", f"{DECODER}.heads.{{task}}.{{n}}.*"),
)


def prepare(state: State, names: Collection[str]) -> State:
    """Return the same network with the layers of ours: joined messages, a split fusion, saliency with two logits."""
    del names
    channels = count_channels(state, "backbone.0.")
    state = split_fusion(join_messages(state), "backbone.1.last_layer", channels)
    return add_background_logits(state, rf"{INITIAL}\.conv_out\.sal|heads\.sal\.2")


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the backbone is no HRNet, the network has no initial predictions or tasks that are only auxiliary.
    """
    del size
    count_channels(state, "backbone.0.")
    check_auxiliary_tasks(state, f"{INITIAL}.conv_out.")
    logits = [v for k, v in state.items() if k.startswith(f"{INITIAL}.conv_out.") and k.endswith(".weight")]
    if not logits:
        raise UserError(f"the checkpoint has no initial predictions ({INITIAL}): it is not PAD-Net's")
    decoder = {"width": logits[0].shape[1], "trunk_width": None, "stride": 4}
    return {"backbone": get_hrnet_overrides(), "decoder": decoder}


METHOD = Method(
    name="pad_net",
    model="PADNet",
    tasks=(
        "semseg",
        "depth",
        "human_parts",
        "sal",
        "normals",
        "edge",
    ),  # in no tensor of all tasks: their order is free
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
    prepare=prepare,
)
