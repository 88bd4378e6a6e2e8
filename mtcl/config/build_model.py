"""Build a model from a config."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtcl.config.resolve import add_key_prefix, construct, locate, plain
from mtcl.errors import UserError
from mtcl.models import DenseModel, EncoderDecoder, SwissArmyKnife, build_backbone
from mtcl.models.decoders import Decoder, TaskDiffusion
from mtcl.models.decoders.atrc import is_named_genotype, read_genotype_file
from mtcl.models.trainable import set_trainable
from mtcl.tasks.base import Task
from mtcl.training.checkpoint import Checkpoint, load_checkpoint


def build_model(config: DictConfig, tasks: Mapping[str, Task], pretrained: bool) -> DenseModel:
    """Build the model of a config, on the CPU.

    Args:
        config: the composed config.
        tasks: name -> task; the model predicts these.
        pretrained: load the backbone's pretrained weights. True for a fresh run only: otherwise neither a hub nor a
            file is read.

    Raises:
        UserError: an option is refused; the message names its key.
    """
    source = config.backbone.weights
    source = None if source in (None, "none") else str(source)
    with add_key_prefix("backbone."):
        backbone = build_backbone(
            config.backbone.name,
            weights=source if pretrained else None,
            mean=plain(config.backbone.mean),
            std=plain(config.backbone.std),
            out_indices=plain(config.backbone.out_indices),
            maps_after=config.backbone.get("maps_after", "stages"),
            upsample_mode=config.backbone.get("upsample_mode"),
            kwargs=plain(config.backbone.kwargs),
        )
    options = plain(config.decoder)
    target = options.pop("_target_")
    kind = locate(target, "decoder")
    if not tasks and kind is not SwissArmyKnife:
        raise UserError(
            f"data={config.data.name} has no labels to train on; scripts/distill.py distils teachers with decoder=sak"
        )
    student = options.pop("weights", None)  # of decoder=sak
    channels = {name: task.channels for name, task in tasks.items()}
    model: DenseModel
    if issubclass(kind, DenseModel):  # a model of its own, woven into the backbone
        model = construct(kind, "decoder", backbone, channels, **options)
    else:
        kind = locate(target, "decoder", Decoder)
        if issubclass(kind, TaskDiffusion):
            check_label_kinds(options.get("kinds") or {}, tasks)
        decoder = construct(kind, "decoder", backbone.channels, backbone.strides, channels, **options)
        model = EncoderDecoder(backbone, decoder)
    if pretrained and student is not None:
        load_student(model, student)
    with add_key_prefix("backbone."):
        set_trainable(model.backbone, config.backbone.get("trainable", "full"), plain(config.backbone.get("lora")))
    # Layouts round differently: evaluate.py must build what was trained. Checkpoints from before the key had none.
    channels_last = OmegaConf.select(config, "trainer.channels_last", default=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout)


def check_label_kinds(kinds: Mapping[str, str], tasks: Mapping[str, Task]) -> None:
    """Raise ``UserError`` if ``decoder.kinds`` calls a task's labels something else than they are."""
    for name, task in tasks.items():
        is_depth = task.prediction_type in ("metres", "inverse_depth")  # which are encoded alike
        expected = "metres" if is_depth else task.prediction_type
        kind = kinds.get(name, "class")
        if kind != expected:
            problem = f"={kind} does not fit the labels of {name}" if name in kinds else " is missing"
            raise UserError(f"decoder.kinds.{name}{problem}; set decoder.kinds.{name}={expected}")


def read_student(path: str) -> Checkpoint:
    """Read the checkpoint of ``scripts/distill.py`` that ``decoder.weights`` names.

    Raises:
        UserError: it is the checkpoint of something else.
    """
    checkpoint = load_checkpoint(path)
    target = (checkpoint.config.get("decoder") or {}).get("_target_", "")
    if str(target).rpartition(".")[2] != SwissArmyKnife.__name__:
        raise UserError(f"decoder.weights={path} is not a checkpoint of scripts/distill.py (decoder=sak)")
    if "backbone" in checkpoint.meta:
        raise UserError(
            f"decoder.weights={path} leaves out its backbone, which was not trained; distil with "
            "trainer.save_backbone=true"
        )
    return checkpoint


def load_student(model: DenseModel, path: str) -> None:
    """Let a model with adapters start from the student of a distillation; ``path`` is ``decoder.weights``."""
    assert isinstance(model, SwissArmyKnife)
    checkpoint = read_student(path)
    teachers = [str(name) for name in checkpoint.config["decoder"].get("teachers") or ()]
    if set(teachers) != set(model.teachers):
        raise UserError(
            f"decoder.weights={path} is a student of {', '.join(teachers)}, but decoder.teachers are "
            f"{', '.join(model.teachers)}; give both the same"
        )
    model.load_student(checkpoint.weights, checkpoint.config["decoder"]["size"], path)


def inline_genotype(config: DictConfig) -> None:
    """Replace the path of a genotype file in ``config`` by the file's content, so that a saved config is complete."""
    genotype = config.decoder.get("genotype")
    if isinstance(genotype, str) and not is_named_genotype(genotype):
        with add_key_prefix("decoder."):
            content = read_genotype_file(genotype)
        OmegaConf.update(config, "decoder.genotype", content, force_add=True)


def saved_config(config: DictConfig, model: DenseModel) -> dict[str, Any]:
    """Return the config for a checkpoint: enough to rebuild the model even if timm's defaults change."""
    saved = plain(config)
    saved["backbone"] |= {"mean": list(model.mean), "std": list(model.std)}
    return saved
