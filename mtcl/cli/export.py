"""Export a trained model for other programs and other people.

    mtcl export CHECKPOINT --format safetensors|torch|onnx --output FOLDER [--fixed-size] [--overwrite]
                [--backbone-weights FILE|hub]
    mtcl export --push USER/NAME --folder FOLDER [--private]
    mtcl export --pull USER/NAME --folder FOLDER [--overwrite]

safetensors  FOLDER/model.safetensors, mtcl.json, README.md (a model card): what mtcl.load(FOLDER) reads
torch        FOLDER/model.pt2, a program of torch.export: torch.export.load(PATH).module()(image)
onnx         FOLDER/model.onnx; needs pip install 'mtcl[export]'

The programs take float32 RGB (B, 3, H, W) of 0..255, normalise it themselves, and give each task's raw prediction
(B, C, H, W) by name, depth clipped at 0; what the values mean is stored with them. recipe.py beside them frames an
image of any size, runs the program and decodes its outputs, as mtcl.load does. Programs take any batch, and any size
from the training frame on, where the model allows it, which is printed at the end; --fixed-size: images of that size
only. Both are run and compared with the model before they are kept. Weights are those that were validated (of the
exponential moving average, where there is one); the regulariser is in none of the files.

--push publishes an exported folder on the Hugging Face hub, --pull downloads one; both need pip install 'mtcl[hub]'.
"""

import argparse
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mtcl.atomic import convert_disk_errors
from mtcl.cli.arguments import BACKBONE_WEIGHTS_HELP, output_path, require_extra
from mtcl.cli.model_card import format_model_card
from mtcl.config.load import HUB_ID, LoadedModel, download_model, import_hub, load_model, replace_model_files
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference.export import PROGRAM_FORMATS, TrainedModel, describe_model, export_program, first_line
from mtcl.inference.model_files import CARD_FILE, HUB_FILES, METADATA_FILE, RECIPE_FILE, WEIGHTS_FILE

FORMATS = ("safetensors", *PROGRAM_FORMATS)
RETRY_HINT = "run it again"
PURPOSES = {  # the argument that chooses it -> further ones: needed, allowed
    "push": (("folder",), ("private",)),
    "pull": (("folder",), ("overwrite",)),
    "checkpoint": (("format", "output"), ("fixed_size", "overwrite", "backbone_weights")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl export``."""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="as for mtcl predict")
    parser.add_argument("--format", choices=FORMATS)
    parser.add_argument("--output", type=output_path, metavar="FOLDER")
    parser.add_argument("--fixed-size", action="store_true", help="export for the training frame's size only")
    parser.add_argument("--backbone-weights", metavar="FILE|hub", help=BACKBONE_WEIGHTS_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model's files")
    parser.add_argument("--push", metavar="USER/NAME", help="publish --folder under this name")
    parser.add_argument("--pull", metavar="USER/NAME", help="download this model to --folder")
    parser.add_argument("--folder", type=output_path, metavar="FOLDER")
    parser.add_argument("--private", action="store_true", help="let only yourself see what is published")


def run(args: argparse.Namespace) -> None:
    """Export, push or pull."""
    purpose = check_combination(args)
    if purpose == "push":
        message = push(args.folder, args.push, args.private)
    elif purpose == "pull":
        check_empty(args.folder, args.overwrite, "--folder")
        with convert_disk_errors(args.folder, RETRY_HINT):
            message = f"{args.pull}: {download_model(args.pull, folder=args.folder)}"
    else:
        if args.format == "onnx":
            require_extra("--format onnx", "export", "onnx", "onnxruntime", "onnxscript")
        check_empty(args.output, args.overwrite, "--output")
        message = export_model(
            load_model(args.checkpoint, args.backbone_weights), args.format, args.output, args.fixed_size
        )
    print(escape_control_characters(message))


def check_combination(args: argparse.Namespace) -> str:
    """Return what is to be done, a key of :data:`PURPOSES`; ``UserError`` where the arguments do not fit together."""
    purpose = next((name for name in PURPOSES if getattr(args, name)), None)
    if purpose is None:
        raise UserError("give a CHECKPOINT, --push or --pull; mtcl export --help says more")
    required, optional = PURPOSES[purpose]
    for name in required:
        if not getattr(args, name):
            raise UserError(f"{_spell(purpose)} needs {_spell(name)}; mtcl export --help says more")
    for name, value in vars(args).items():
        if value and name not in (purpose, *required, *optional):
            raise UserError(f"{_spell(name)} makes no sense together with {_spell(purpose)}; leave it out")
    return purpose


def _spell(name: str) -> str:
    return "CHECKPOINT" if name == "checkpoint" else f"--{name.replace('_', '-')}"


def export_model(loaded: LoadedModel, format: str, folder: Path, fixed_size: bool = False) -> str:
    """Write all files of one format, checked, or none.

    Args:
        loaded: The model.
        format: One of :data:`FORMATS`.
        folder: Where they go; an earlier model's files in any format are replaced.
        fixed_size: Export a program for the training frame's size only.

    Returns:
        A sentence on what was written.
    """
    trained = TrainedModel(loaded.model, loaded.tasks, loaded.size, loaded.saved.step)
    with (
        convert_disk_errors(folder / format, RETRY_HINT),
        replace_model_files(folder, (*HUB_FILES, RECIPE_FILE)) as temporary,
    ):
        if format == "safetensors":
            message = write_weights(loaded, trained, temporary)
        else:
            message = export_program(trained, format, temporary, fixed_size)
    return f"{folder}: {message}"


def check_empty(folder: Path, overwrite: bool, option: str) -> None:
    """Raise ``UserError`` where a folder to write holds files that are not to be overwritten."""
    if folder.is_file():
        raise UserError(f"{option} {folder} is a file; give a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{option} {folder} is not empty; give an empty folder, or --overwrite")


def write_weights(loaded: LoadedModel, trained: TrainedModel, folder: Path) -> str:
    """Write what ``mtcl.load`` reads, with a model card; return a sentence on it."""
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in loaded.model.state_dict().items()}
    (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file hides the disk's errors
    saved = loaded.saved
    metadata = {**describe_model(trained), "tasks": saved.tasks, "config": remove_local_paths(saved.config)}
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    (folder / CARD_FILE).write_text(format_model_card(loaded), "utf-8")
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return f"{WEIGHTS_FILE} ({count:,} parameters), {METADATA_FILE}, {CARD_FILE}; mtcl.load reads the folder"


def remove_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config without the folder of the training images; it names no other files."""
    copied = deepcopy(dict(config))
    copied["data"]["root"] = None
    return copied


def push(folder: Path, name: str, private: bool = False) -> str:
    """Publish an exported folder as ``name`` (user/model) and return its address."""
    if not HUB_ID.fullmatch(name):
        raise UserError(f"--push {name} is no name on the hub; give USER/NAME")
    for file in (METADATA_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"--folder {folder} has no {file}; make it with mtcl export --format safetensors")
    library = import_hub(f"--push {name}")
    api = library.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(
                f"--push {name} exists already, and is public; make it private on the hub, or choose another"
            )
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(HUB_FILES)))
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, library.errors.LocalTokenNotFoundError):
            raise UserError(
                f"--push {name}: the hub asks for a token that may write there; hf auth login, or set HF_TOKEN"
            ) from error
        raise UserError(
            f"--push {name}: the hub refused it ({first_line(error)}); check the connection and the name"
        ) from error
