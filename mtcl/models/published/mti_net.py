"""Rules for MTI-Net.

Source: github.com/SimonVandenhende/Multi-Task-Learning-PyTorch, models (mti_net.py, padnet.py, layers.py,
seg_hrnet.py).
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
from mtcl.models.published.translation import Method, Overrides, Rule, State


def to_conv(weight: Tensor) -> Tensor:
    """Return the weight of a linear layer as that of a 1x1 convolution; a bias as it is."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


def get_propagation_rules(scale: int) -> tuple[Rule, ...]:
    """Return the rules of the propagation from a scale (1 to 3) to the next finer one."""
    source, target = f"fpm_scale_{scale}", f"decoder.propagation.{scale - 1}"
    return (
        Rule(f"{source}.non_linear.*", f"{target}.attention.*"),
        Rule(f"{source}.dimensionality_reduction.*", f"{target}.reduction.*"),
        Rule(f"{source}.se.{{task}}.squeeze.0.*", f"{target}.excitation.{{task}}.fc1.*", to_conv),
        Rule(f"{source}.se.{{task}}.squeeze.2.*", f"{target}.excitation.{{task}}.fc2.*", to_conv),
    )


RULES = (
    *get_hrnet_rules("backbone."),
    Rule("scale_{n}.refinement.{task}.*", "decoder.initial.{n}.{task}.*"),
    Rule("scale_{n}.decoders.{task}.*", "decoder.initial_logits.{n}.{task}.*"),
    *(rule for scale in (1, 2, 3) for rule in get_propagation_rules(scale)),
    Rule(
        "distillation_scale_{n}.self_attention.{task}.{other}.weight",
        "decoder.distillation.{n}.messages.{task}.{other}.0.weight",
    ),
    Rule("heads.{task}.last_layer.0.{n}.weight", "decoder.aggregation.{task}.project.{n}.weight"),
    Rule("heads.{task}.last_layer.1.*", "decoder.aggregation.{task}.norm.*"),
    Rule("heads.{task}.last_layer.3.*", "decoder.logits.{task}.*"),
)


def prepare(state: State, names: Collection[str]) -> State:
    """Return the same network with the layers of ours: joined messages, split fusions, saliency with two logits."""
    del names
    channels = count_channels(state, "backbone.")
    state = join_messages(state)
    for task in list_tasks(state, "heads."):
        state = split_fusion(state, f"heads.{task}.last_layer", channels)
    return add_background_logits(state, r"scale_\d\.decoders\.sal|heads\.sal\.last_layer\.3")


def list_tasks(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Return the tasks that have layers below ``prefix``, in their order."""
    return list(dict.fromkeys(key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)))


def check_auxiliary_tasks(state: Mapping[str, Tensor], initial: str) -> None:
    """Check that every task with initial predictions has final ones, which our decoders need.

    Args:
        state: the authors' tensors.
        initial: what precedes a task in the names of the initial predictions.

    Raises:
        UserError: some task is only an auxiliary one.
    """
    auxiliary = [task for task in list_tasks(state, initial) if task not in list_tasks(state, "heads.")]
    if auxiliary:
        raise UserError(
            f"the checkpoint has auxiliary tasks ({', '.join(auxiliary)}), of which it makes no final prediction; "
            "our decoder can't be built so, choose a checkpoint that predicts all of its tasks"
        )


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the backbone is no HRNet, or the network has tasks that are only auxiliary.
    """
    del size
    count_channels(state, "backbone.")
    check_auxiliary_tasks(state, "scale_0.decoders.")
    decoder = {"pyramid_width": None, "attention_over": "neighbouring_channels"}
    return {"backbone": get_hrnet_overrides(), "decoder": decoder}


METHOD = Method(
    name="mti_net",
    model="MTINet",
    tasks=("semseg", "human_parts", "sal", "normals", "edge", "depth"),  # utils/config.py
    rules=lambda _: RULES,
    config_overrides=get_config_overrides,
    prepare=prepare,
)
