"""Load models from checkpoints, run folders, exported folders and the Hugging Face hub."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.stored_config import (
    check_stored_backbone,
    check_stored_config,
    check_stored_tasks,
    check_tasks,
    describe_backbone_source,
)
from mtcl.errors import UserError, escape_control_characters, first_line
from mtcl.inference import Predictor
from mtcl.inference.model_files import HUB_FILES, METADATA_FILE, RECIPE_FILE, SHIPPED_MODELS, WEIGHTS_FILE
from mtcl.models import DenseModel
from mtcl.models.lora import is_base_weight, merge_adapters
from mtcl.models.weights import check_weights
from mtcl.run_folder import CHECKPOINTS, LAST_CHECKPOINT, RunFolder
from mtcl.runtime import choose_device
from mtcl.safe_files import read_json
from mtcl.tasks.base import Task
from mtcl.training.checkpoint import Checkpoint, hash_backbone, load_checkpoint

MAX_METADATA_BYTES = 4 << 20  # bytes of mtcl.json
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class SavedModel(NamedTuple):
    """Weights, config and tasks of a saved model, from which it is rebuilt."""

    path: Path
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    tasks: Any  # as describe_tasks has them
    step: int
    source: str = ""  # as it was named to :func:`read_saved_model`
    backbone: Mapping[str, str] | None = None  # whose weights are left out: name, weights, sha256


class LoadedModel(NamedTuple):
    """A model with its weights and what is needed to use it."""

    model: DenseModel  # in evaluation mode, on the CPU
    tasks: dict[str, Task]
    size: tuple[int, int]  # of the frame it was trained in
    saved: SavedModel


def load(
    source: str | Path,
    device: str = "auto",
    tasks: Sequence[str] | None = None,
    precision: str = "auto",
    backbone_weights: str | Path | None = None,
    **options: Any,
) -> Predictor:
    """Load a trained model for inference.

    Args:
        source: a checkpoint (.pt), a run folder (its last checkpoint), a folder that ``mtcl export`` wrote, the
            name of one on the Hugging Face hub (``user/model``), or ``rooms``, the model that comes with mtcl.
        device: ``auto``, ``cpu`` or ``cuda``.
        tasks: the tasks to predict; None: all of the model's.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        backbone_weights: of a frozen backbone that the checkpoint leaves out: a file, or ``hub``.
        options: further arguments of :class:`mtcl.inference.Predictor`.

    Returns:
        A predictor of images of any size.

    Raises:
        UserError: the source is missing or damaged, or its config describes no model that can be built.
    """
    return build_predictor(load_model(source, backbone_weights), device, tasks, precision, **options)


def build_predictor(
    loaded: LoadedModel,
    device: str = "auto",
    tasks: Sequence[str] | None = None,
    precision: str = "auto",
    **options: Any,
) -> Predictor:
    """Build the predictor of a loaded model; for the arguments see :func:`load`."""
    names = list(loaded.tasks) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError(f"tasks= is empty; {loaded.saved.path} has {', '.join(loaded.tasks)}")
    for name in names:
        if name not in loaded.tasks:
            raise UserError(f"{loaded.saved.path} has no task {name}; it has {', '.join(loaded.tasks)}")
    chosen = {name: task for name, task in loaded.tasks.items() if name in names}
    return Predictor(loaded.model, chosen, loaded.size, choose_device(device, "device"), precision, **options)


def load_model(source: str | Path, backbone_weights: str | Path | None = None) -> LoadedModel:
    """Rebuild the model in ``source``, see :func:`load`; nothing in there is run as code, read or fetched."""
    return _load_saved_model(read_saved_model(source), backbone_weights)


def load_models(sources: Sequence[str | Path], backbone_weights: str | Path | None = None) -> list[LoadedModel]:
    """Rebuild several models as :func:`load_model`; the weights are for those that leave out their backbone."""
    saved = [read_saved_model(source) for source in sources]
    return [_load_saved_model(*pair) for pair in zip(saved, assign_backbone_weights(saved, backbone_weights))]


def assign_backbone_weights(
    models: Sequence[SavedModel], backbone_weights: str | Path | None
) -> list[str | Path | None]:
    """Return for each of several models the weights of a backbone: to all, where none leaves out its own."""
    lacking = [saved.backbone is not None for saved in models]
    return [backbone_weights if lacks or not any(lacking) else None for lacks in lacking]


def _load_saved_model(saved: SavedModel, backbone_weights: str | Path | None) -> LoadedModel:
    """Rebuild a saved model in evaluation mode, with its tasks."""
    config = restore_config(saved)
    with convert_build_errors(saved.path):
        tasks = build_tasks(config)
    check_tasks(dict(saved.tasks), tasks, saved.path)
    model = rebuild_model(config, tasks, saved, backbone_weights)
    return LoadedModel(model.eval(), tasks, get_image_size(config), saved)


def restore_config(saved: SavedModel) -> DictConfig:
    """Return the config of a saved model with its own tasks, whatever another version of its dataset would offer."""
    config = OmegaConf.create(dict(saved.config))
    config.tasks.names = list(saved.tasks)
    return config


def rebuild_model(
    config: DictConfig, tasks: Mapping[str, Task], saved: SavedModel, backbone_weights: str | Path | None = None
) -> DenseModel:
    """Build the model that ``config`` describes and fill in the saved weights.

    Its shapes are compared first: a config that describes more than the file holds allocates nothing. What of the
    backbone was trained makes no difference here: adapters are merged.
    """
    config = config.copy()
    config.backbone.trainable = "full"
    with convert_build_errors(saved.path), torch.device("meta"):
        outline = build_model(config, tasks, pretrained=False).state_dict()
    if saved.backbone is not None:
        heads = {name: tensor for name, tensor in outline.items() if not is_base_weight(name)}
        check_weights({n: value for n, value in saved.weights.items() if ".lora_" not in str(n)}, heads, saved.path)
        saved = _add_backbone(config, tasks, saved, backbone_weights)
    elif backbone_weights is not None:
        raise UserError(f"{saved.path} has a backbone with weights of its own; leave out backbone_weights")
    check_weights(saved.weights, outline, saved.path)
    with convert_build_errors(saved.path):
        model = build_model(config, tasks, pretrained=False)
    model.load_state_dict(dict(saved.weights))
    return model


def _add_backbone(
    config: DictConfig, tasks: Mapping[str, Task], saved: SavedModel, backbone_weights: str | Path | None
) -> SavedModel:
    """Return a saved model with the weights of the backbone that its checkpoint leaves out.

    Nobody but the caller says where they are: a stored config could name any file or model.
    """
    assert saved.backbone is not None
    origin = describe_backbone_source(saved.backbone)
    if backbone_weights is None:
        raise UserError(
            f"{saved.path} leaves out its frozen backbone, {origin}; give these weights, FILE or hub, as "
            "backbone.weights= (evaluate.py), --backbone-weights (mtcl predict, export, demo, "
            "scripts/consistency.py) or backbone_weights= (mtcl.load)"
        )
    config.backbone.weights = str(backbone_weights)
    with convert_build_errors(saved.path, passthrough=UserError):
        complete = build_model(config, tasks, pretrained=True).state_dict()
    digest = hash_backbone(complete)
    if digest != saved.backbone["sha256"]:
        raise UserError(
            f"{backbone_weights} gives another backbone (SHA-256 {digest[:12]}...) than {saved.path} was trained on, "
            f"{origin}; give its weights"
        )
    base = {name: value for name, value in complete.items() if is_base_weight(name)}
    return _merge_adapters(saved._replace(weights={**base, **saved.weights}))


def _merge_adapters(saved: SavedModel) -> SavedModel:
    """Return a saved model with plain weights."""
    if saved.config["backbone"]["trainable"] != "lora":
        return saved
    try:
        return saved._replace(weights=merge_adapters(saved.weights, saved.config["backbone"]["lora"].get("alpha", 16)))
    except UserError as error:
        raise UserError(f"the weights in {saved.path} are damaged: {error}") from error


@contextlib.contextmanager
def convert_build_errors(path: Path, passthrough: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Convert what building from a stored config raises to a ``UserError`` that names the file it is stored in.

    Values that fit their rules one by one may still not go together; timm, torch and the decoders raise many kinds.
    Exceptions of the type ``passthrough`` stay as they are.
    """
    try:
        yield
    except passthrough:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        reason = escape_control_characters(first_line(reason))
        raise UserError(f"the config stored in {path} describes no model that can be built: {reason}") from error


def read_saved_model(source: str | Path) -> SavedModel:
    """Read what a model is rebuilt from; ``source``: see :func:`load`. The config has passed the schema."""
    return _read_saved_model(source)._replace(source=str(source))


def _read_saved_model(source: str | Path) -> SavedModel:
    path = find_model_file(source)
    if path.suffix != ".json":
        return read_checkpoint_model(path, load_checkpoint(path))
    if path.name != METADATA_FILE:
        raise UserError(f"{path} is neither a checkpoint (.pt) nor an exported folder; give one of these")
    metadata = read_json(path, MAX_METADATA_BYTES)
    missing = [key for key in ("config", "tasks", "step") if not isinstance(metadata, dict) or key not in metadata]
    if missing:
        raise UserError(f"{path} is damaged, or of no exported model: it has no {missing[0]}; export the model again")
    file = path.with_name(WEIGHTS_FILE)
    if not file.is_file():
        raise UserError(f"{path.parent} has no {WEIGHTS_FILE}; export the model again")
    try:
        weights = load_file(file)
    except Exception as error:  # of safetensors, of the disk
        raise UserError(f"{file} is damaged, or holds no weights ({error}); export the model again") from error
    return validate_saved_model(
        SavedModel(path.parent, weights, metadata["config"], metadata["tasks"], metadata["step"])
    )


def read_checkpoint_model(path: Path, checkpoint: Checkpoint) -> SavedModel:
    """Take from a checkpoint what a model is rebuilt from; the weights are those that were validated, merged."""
    tasks = checkpoint.meta.get("tasks")
    saved = validate_saved_model(SavedModel(path, checkpoint.weights, checkpoint.config, tasks, checkpoint.step))
    if "backbone" in checkpoint.meta:
        return saved._replace(backbone=check_stored_backbone(checkpoint.meta["backbone"], path))
    return _merge_adapters(saved)


def validate_saved_model(saved: SavedModel) -> SavedModel:
    """Return ``saved`` with its config and tasks checked, see :mod:`mtcl.config.stored_config`."""
    if type(saved.step) is not int or saved.step < 0:
        raise UserError(f"{saved.path} does not say at which step it was written")
    config, tasks = check_stored_config(saved.config, saved.path), check_stored_tasks(saved.tasks, saved.path)
    return saved._replace(config=config, tasks=tasks)


def find_model_file(source: str | Path) -> Path:
    """Return the path of the checkpoint, or of the metadata of an exported folder, that ``source`` means."""
    path = Path(source).expanduser()
    if str(source) in SHIPPED_MODELS and not path.exists():
        return SHIPPED_MODELS[str(source)] / METADATA_FILE
    if path.is_dir():
        for candidate in (path / METADATA_FILE, RunFolder(path).last_checkpoint, path / LAST_CHECKPOINT):
            if candidate.is_file():
                return candidate
        raise UserError(
            f"{path} holds neither an exported model ({METADATA_FILE}) nor a run ({CHECKPOINTS}/{LAST_CHECKPOINT})"
        )
    if path.is_file() or not HUB_ID.fullmatch(str(source)) or path.suffix == ".pt":
        return path  # whoever reads it says that it is missing
    return download_model(str(source)) / METADATA_FILE


def download_model(name: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """Download an exported model from the Hugging Face hub, unless it is in the hub's cache.

    Args:
        name: ``USER/NAME`` on the hub.
        revision: branch, tag or commit; None: the newest.
        folder: where to put the model, with all formats that were published; None: leave it in the hub's cache.

    Returns:
        The folder that contains the model.
    """
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name} is no name on the hub; give USER/NAME")
    if folder is None:
        return _fetch(name, revision, HUB_FILES[:3], None, f"{name} is no file or folder here")
    with replace_model_files(folder) as staging:  # a folder that holds files would hide a failure
        _fetch(name, revision, HUB_FILES, staging, f"--pull {name}")
    return folder


@contextlib.contextmanager
def replace_model_files(folder: Path, names: Sequence[str] = HUB_FILES) -> Iterator[Path]:
    """Replace the model in ``folder``, in any format, by what is written into the folder that is yielded.

    At the end the files of these ``names`` move into ``folder`` together; if anything fails, none does.

    Raises:
        UserError: one of them is a link or not a file.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
    try:
        yield staging
        paths = [staging / name for name in names if os.path.lexists(staging / name)]
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise UserError(f"{path.name} of what was to go into {folder} is a link or no file; nothing was taken")
        for name in (*HUB_FILES, RECIPE_FILE):
            (folder / name).unlink(missing_ok=True)
        # What says that the folder is a model comes last.
        for path in sorted(paths, key=lambda path: path.name == METADATA_FILE):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it contains something by now
                folder.rmdir()


def _fetch(name: str, revision: str | None, files: Sequence[str], target: Path | None, subject: str) -> Path:
    """Fetch files of a model on the hub; ``subject`` begins the message of an error."""
    library = import_hub(subject)
    try:
        folder = library.snapshot_download(name, revision=revision, allow_patterns=list(files), local_dir=target)
    except Exception as error:  # the library raises many kinds
        reason = first_line(error)
        raise UserError(f"{subject}, and the hub did not give it ({reason})") from error
    if not (Path(folder) / METADATA_FILE).is_file():
        raise UserError(f"{name} on the hub is no model of mtcl: it has no {METADATA_FILE}")
    return Path(folder)


def import_hub(subject: str) -> Any:
    """Import the hub's library; ``subject`` begins the message that it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{subject}; models on the Hugging Face hub need pip install 'mtcl[hub]'") from error
    return huggingface_hub
