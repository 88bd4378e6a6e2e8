"""Rules for SAK, of both stages: a student's file has no tasks, and its names lack the first ``backbone.``.

Source: github.com/innovator-zero/SAK, models (backbones/sak.py, backbones/vit.py, heads.py, build_models.py).
"""

from collections.abc import Mapping

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.translation import Method, Overrides, Rule
from mtcl.models.published.vit import get_vit_overrides


def find_prefix(state: Mapping[str, Tensor]) -> str:
    """Return what precedes the names of the ViT and the adapters: nothing in a file of the first stage."""
    return "backbone." if any(key.startswith("backbone.") for key in state) else ""


def list_level_norms(state: Mapping[str, Tensor]) -> list[tuple[int, str]]:
    """Return (block, teacher) of each output norm, in order."""
    start = f"{find_prefix(state)}out_norms."
    names = {key.removeprefix(start).partition(".")[0] for key in state if key.startswith(start)}
    pairs = [name.partition("_") for name in names]
    return sorted((int(block), teacher) for block, _, teacher in pairs if block.isdigit())


def to_conv(weight: Tensor) -> Tensor:
    """Return the weight of a linear layer as that of a 1x1 convolution; a bias as it is."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


def get_rules(state: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Return the rules of what predicts; the aligners do not, see :func:`list_regularizer_keys`."""
    prefix, norms = find_prefix(state), list_level_norms(state)
    blocks = sorted({block for block, _ in norms})
    teachers = dict.fromkeys(teacher for _, teacher in norms)
    return (
        *(
            Rule(f"{prefix}vit.{name}", f"backbone.net.model.{name}")
            for name in ("cls_token", "pos_embed", "patch_embed.proj.*", "blocks.{n}.*")
        ),
        *(Rule(f"{prefix}tsap.{name}.*", f"adapters.{name}.*") for name in teachers),
        *(
            Rule(f"{prefix}out_norms.{block}_{name}.*", f"norms.{name}.{blocks.index(block)}.*")
            for block, name in norms
        ),
        Rule(f"{prefix}ts_aligners.*", None),
        *(
            Rule(f"{prefix}mor.{block}_{{task}}.router.module.*", f"routers.{{task}}.{level}.layers.*")
            for level, block in enumerate(blocks)
        ),
        Rule("heads.{task}.linears.{n}.*", "heads.{task}.project.{n}.*", to_conv),
        Rule("heads.{task}.linear_fuse.{n}.*", "heads.{task}.fuse.{n}.*"),
        Rule("heads.{task}.last_conv.*", "logits.{task}.*"),
    )


def list_regularizer_keys(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the key of each aligner, which leads to a teacher's channels -> its key in our regulariser's state."""
    start = f"{find_prefix(state)}ts_aligners."
    blocks = sorted({block for block, _ in list_level_norms(state)})
    keys = {}
    for key in state:
        if key.startswith(start):
            name, _, kind = key.removeprefix(start).rpartition(".")
            block, _, teacher = name.partition("_")
            if block.isdigit() and int(block) in blocks:
                keys[key] = f"aligners.{teacher}_level{blocks.index(int(block)) + 1}.{kind}"
    return keys


def get_config_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> Overrides:
    """Return the config keys that the published network needs.

    Raises:
        UserError: the file has no adapters, its ViT has LoRA's, or was made for another ``size`` (height, width).
    """
    prefix, norms = find_prefix(state), list_level_norms(state)
    teachers = list(dict.fromkeys(teacher for _, teacher in norms))
    down = state.get(f"{prefix}tsap.{teachers[0]}.0.down.weight") if teachers else None
    if down is None:
        raise UserError("the checkpoint has no adapters (tsap, out_norms): it is not SAK's")
    if any(key.startswith(f"{prefix}vit.base_model.") for key in state):
        raise UserError(
            "the checkpoint's ViT has LoRA's adapters beside its weights; merge them into the weights, then import it"
        )
    # Their order is that of a router's outputs, which the adapters' names keep.
    start = f"{prefix}tsap."
    teachers = list(dict.fromkeys(key.removeprefix(start).partition(".")[0] for key in state if key.startswith(start)))
    vit = get_vit_overrides(
        {key.replace(f"{prefix}vit.", "backbone."): value for key, value in state.items() if ".vit." in f".{key}"}, size
    )
    decoder = {"size": list(size), "teachers": teachers, "reduction": down.shape[1] // down.shape[0]}
    outputs = [v.shape[0] for k, v in state.items() if k.endswith("router.module.3.bias")]
    if outputs:
        decoder |= {"routing": "mixture", "noisy_gating": outputs[0] == 2 * (1 + len(teachers))}
    elif prefix:
        decoder |= {"routing": "sum"}
    return {"backbone": {"mean": vit["mean"], "std": vit["std"]}, "decoder": decoder}


METHOD = Method(
    name="sak",
    model="SwissArmyKnife",
    tasks=(
        "semseg",
        "depth",
        "human_parts",
        "sal",
        "normals",
        "edge",
    ),  # in no tensor of all tasks: their order is free
    rules=get_rules,
    config_overrides=get_config_overrides,
    regularizer_keys=list_regularizer_keys,
    first_iteration=1,  # train_s1.py and train_s2.py save how many there were
)
