"""A trained model as files for other programs, and to and from the Hugging Face hub."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim

from mtcl.atomic import convert_disk_errors
from mtcl.cli import arguments as read
from mtcl.cli.model_card import RAW_MEANINGS, format_model_card, round_values
from mtcl.config.load import (
    CARD_FILE,
    HUB_FILES,
    HUB_ID,
    METADATA_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    LoadedModel,
    download_model,
    import_hub,
    load_model,
    replace_model_files,
)
from mtcl.data import Sample, prepare_batch
from mtcl.data.loader import collate
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference import recipe
from mtcl.inference.predictor import RESIZE_THRESHOLD, SIZE_MULTIPLE
from mtcl.models import DenseModel
from mtcl.tasks.base import Task
from mtcl.version import __version__

FORMATS = ("safetensors", "torch", "onnx")
PROGRAM, ONNX = "model.pt2", "model.onnx"
TOLERANCE = 1e-4  # of an exported model's outputs, times the output's largest value where that is above 1
MOST = 256  # multiples of a side that a program is made for; of a batch, too
TRACED = 6  # as many at least: where a map has one row or column, a tracer takes that for a rule
INPUT = "float32 (batch, 3, height, width), RGB, 0..255, not normalised"
UNITS = {"metres": "m", "probability": "1"}  # by a task's kind; of the outputs decoded
KEYS: dict[str, Any] = {
    "checkpoint": str,
    "format": read.choice(*FORMATS),
    "output": read.path,
    "fixed": read.flag,
    "overwrite": read.flag,
    "push": str,
    "pull": str,
    "folder": read.path,
    "private": read.flag,
}
PURPOSES = {
    "export": ("checkpoint", "format", "output", "fixed", "overwrite"),
    "push": ("push", "folder", "private"),
    "pull": ("pull", "folder", "overwrite"),
}


def export(words: Sequence[str]) -> None:
    """What ``scripts/export.py`` does with its words."""
    given = read.parse(words, KEYS)
    purpose = next((p for p in ("push", "pull") if p in given), "export")
    needed = ("checkpoint", "format", "output") if purpose == "export" else (purpose, "folder")
    for key in needed:
        if not given.get(key):
            raise UserError(f"export.py needs {key}=; python scripts/export.py --help says more")
    for key in given:
        if key not in PURPOSES[purpose]:
            raise UserError(f"{key}= makes no sense together with {needed[0]}=; leave it out")
    if purpose == "push":
        print(escape_control_characters(push(given["folder"], given["push"], given.get("private", False))))
    elif purpose == "pull":
        folder = given["folder"]
        check_empty(folder, given.get("overwrite", False), "folder")
        with convert_disk_errors(folder, "run it again"):
            print(escape_control_characters(f"{given['pull']}: {download_model(given['pull'], folder=folder)}"))
    else:
        for package in ("onnx", "onnxruntime", "onnxscript") if given["format"] == "onnx" else ():
            if find_spec(package) is None:
                raise UserError(f"format=onnx needs the package {package}; pip install 'mtcl[export]'")
        check_empty(given["output"], given.get("overwrite", False), "output")
        loaded = load_model(given["checkpoint"])
        print(
            escape_control_characters(export_model(loaded, given["format"], given["output"], given.get("fixed", False)))
        )


def export_model(loaded: LoadedModel, kind: str, folder: Path, fixed: bool = False) -> str:
    """Files of one of :data:`FORMATS` in ``folder``: all that belong together, checked, or none. What they are, in
    words.

    ``fixed``: for pictures of the training frame's size only, even where the model could be exported for others.
    """
    makers: dict[str, Callable[[Path], str]] = {
        "safetensors": lambda place: write_weights(loaded, place),
        "torch": lambda place: write_program(loaded, place, fixed, torch_program),
        "onnx": lambda place: write_program(loaded, place, fixed, onnx_program),
    }
    with (
        convert_disk_errors(folder / kind, "run it again"),
        replace_model_files(folder, (*HUB_FILES, RECIPE_FILE)) as place,
    ):
        told = makers[kind](place)
    return f"{folder}: {told}"


def check_empty(folder: Path, overwrite: bool, key: str) -> None:
    if folder.is_file():
        raise UserError(f"{key}={folder} is a file; give a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{key}={folder} holds something already; give an empty folder, or overwrite=true")


# Weights and a card


def write_weights(loaded: LoadedModel, folder: Path) -> str:
    """What ``mtcl.load`` reads, with a card for people."""
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in loaded.model.state_dict().items()}
    (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file hides the disk's errors
    saved = loaded.saved
    facts = {**describe_model(loaded), "tasks": saved.tasks, "config": remove_local_paths(saved.config)}
    (folder / METADATA_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    (folder / CARD_FILE).write_text(format_model_card(loaded), "utf-8")
    count = sum(p.numel() for p in loaded.model.parameters())
    return f"{WEIGHTS_FILE} ({count:,} parameters), {METADATA_FILE}, {CARD_FILE}; mtcl.load reads the folder"


def remove_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config, which names no other files any more, without the folder of the training images."""
    copied = deepcopy(dict(config))
    copied["data"]["root"] = None
    return copied


# Programs


class ExportModule(nn.Module):
    """Normalisation, model, and depth clipped at 0: pictures as :data:`INPUT` -> task -> prediction (B, C, H, W),
    float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: DenseModel, tasks: Mapping[str, Task]):
        super().__init__()
        self.model, self.tasks = model, dict(tasks)
        for name, values in (("mean", model.mean), ("std", model.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model.predict((image - self.mean) / self.std)
        return {name: clip_prediction(task, found[name]) for name, task in self.tasks.items()}


def clip_prediction(task: Task, raw: Tensor) -> Tensor:
    """Clip what every metric and ``mtcl.load`` clip."""
    return raw.clamp(min=0) if task.prediction_type == "metres" else raw


class InputSpec(NamedTuple):
    """What an exported program takes."""

    frame: tuple[int, int]  # (height, width) of pictures up to the training frame's size; no smaller input is needed
    multiple: int  # of height and width
    any_batch: bool
    any_size: bool

    def __str__(self) -> str:
        height, width = self.frame
        sides = f"any height and width that are multiples of {self.multiple}, from {height} x {width} on"
        sides = sides if self.any_size else f"pictures of {height} x {width} only"
        return f"{f'batches up to {MOST}' if self.any_batch else 'one picture at a time'}, {sides}"

    def examples(self) -> list[tuple[int, int, int]]:
        """(batch, height, width) that a program is checked at: several of each where it takes them."""
        height, width = self.frame
        found = [(1, height, width)] + [(3, height, width)] * self.any_batch
        if self.any_size:
            count, square = (2 if self.any_batch else 1), max(self.frame)
            found += [(count, height + self.multiple, width + 2 * self.multiple), (count, square, square)]
        return found


Run = Callable[[Tensor], Mapping[str, Tensor]]
Made = tuple[str, Run]  # the file's name, and how it is run
Maker = Callable[[torch.export.ExportedProgram, LoadedModel, InputSpec, Path], Made]


class ExportError(Exception):
    """A program that can't be made, or run, for all that its :class:`InputSpec` promises."""


def write_program(loaded: LoadedModel, folder: Path, fixed: bool, maker: Maker) -> str:
    """The widest :class:`InputSpec` that the model's operations allow."""
    model = loaded.model
    multiple = model.backbone.multiple
    least = tuple(recipe.round_up(side, multiple) for side in loaded.size)
    reason = "as asked for" if fixed else "its operations can't be exported for other sizes"
    if has_windows(model):
        fixed, reason = True, "its backbone cuts pictures into windows whose number is fixed in a traced program"
    elif min(least) == multiple:
        fixed, reason = True, f"a side of its training frame is a single {multiple}, which a tracer takes for a rule"
    # A picture of the training frame's size is rounded up before the backbone's multiple is.
    frame = tuple(recipe.round_up(recipe.round_up(side, SIZE_MULTIPLE), multiple) for side in loaded.size)
    shapes = [InputSpec((least[0], least[1]), multiple, True, True)] * (not fixed)
    shapes += [InputSpec((frame[0], frame[1]), multiple, batch, False) for batch in (True, False)]
    error: Exception | None = None
    for shape in shapes:
        try:
            with silence_exporters():
                program = trace(ExportModule(model, loaded.tasks).eval(), shape)
                count = count_parameters(program, model)
                name, run = maker(program, loaded, shape, folder)
                worst = check(run, loaded, shape, name)
            (folder / RECIPE_FILE).write_text(Path(recipe.__file__).read_text("utf-8"), "utf-8")
            why = "" if shape.any_size else f" ({reason})"
            return f"{name} takes {shape}{why}; as eager to {worst:.1e}; {count:,} parameters, all of them the model's"
        except ExportError as problem:
            error = problem
            reason = first_line(problem) if shape.any_size else reason
            for path in folder.iterdir():
                path.unlink()
    assert error is not None
    raise UserError(f"this model can't be exported so: {first_line(error)}") from error


def count_parameters(program: torch.export.ExportedProgram, model: DenseModel) -> int:
    """How many numbers were trained; ``UserError`` where some are not the model's (a regulariser's)."""
    strangers = set(program.state_dict) - {f"model.{name}" for name in model.state_dict()}
    if strangers:
        raise UserError(f"this model brings along {min(strangers)}, which is none of its weights; nothing was kept")
    return sum(parameter.numel() for parameter in program.parameters())


def has_windows(model: DenseModel) -> bool:
    """Swin and its kin; tracing them for any size takes very long and ends without one."""
    return any(hasattr(module, "window_size") for module in model.backbone.modules())


def trace(module: nn.Module, shape: InputSpec) -> torch.export.ExportedProgram:
    height, width = shape.frame
    dynamic: dict[int, Any] = {}
    if shape.any_batch:
        dynamic[0] = Dim("batch", min=1, max=MOST)
    if shape.any_size:
        names = ("rows", "columns")
        for i, (name, side) in enumerate(zip(names, shape.frame)):
            dynamic[2 + i] = shape.multiple * Dim(name, min=side // shape.multiple, max=MOST)
        height, width = (max(side, TRACED * shape.multiple) for side in shape.frame)
        width += shape.multiple * (height == width)  # a square would be taken for a rule
    example = torch.zeros(2 if shape.any_batch else 1, 3, height, width)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is traced for one size of batch only
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # many kinds
        raise ExportError(first_line(error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def torch_program(program: torch.export.ExportedProgram, loaded: LoadedModel, shape: InputSpec, folder: Path) -> Made:
    path = folder / PROGRAM
    facts = describe_program(loaded, shape)
    try:
        buffer = io.BytesIO()  # written to the disk, it would hide the disk's errors
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(facts)})
    except Exception as error:  # an operation on sizes that can be traced, but not written (a ViT's: ceil)
        raise ExportError(first_line(error)) from error
    path.write_bytes(buffer.getbuffer())
    return PROGRAM, torch.export.load(path).module()


def onnx_program(program: torch.export.ExportedProgram, loaded: LoadedModel, shape: InputSpec, folder: Path) -> Made:
    import onnxruntime

    path = folder / ONNX
    try:
        found = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=list(loaded.tasks)
        )
        assert found is not None
    except Exception as error:  # many kinds
        raise ExportError(first_line(error)) from error
    facts = describe_program(loaded, shape)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    found.model.metadata_props.update({**texts, METADATA_FILE: json.dumps(facts)})
    found.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(first_line(error)) from error

    def run(image: Tensor) -> dict[str, Tensor]:
        outputs = session.run(list(loaded.tasks), {"image": image.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(loaded.tasks, outputs)}

    return ONNX, run


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """Describe what the model takes and gives: who uses a program needs it, and an exported folder has it, too."""
    return {
        "mtcl": __version__,
        "step": loaded.saved.step,
        "classes": {name: list(getattr(task, "classes", ())) for name, task in loaded.tasks.items()},
        "kinds": {name: task.prediction_type for name, task in loaded.tasks.items()},
        "outputs": {name: RAW_MEANINGS[task.prediction_type] for name, task in loaded.tasks.items()},
        "units": {name: UNITS.get(task.prediction_type, "") for name, task in loaded.tasks.items()},
        "mean": round_values(loaded.model.mean),
        "std": round_values(loaded.model.std),
        "size": list(loaded.size),
        "rounding": SIZE_MULTIPLE,
        "multiple": loaded.model.backbone.multiple,
        "as_it_is": RESIZE_THRESHOLD,
    }


def describe_program(loaded: LoadedModel, shape: InputSpec) -> dict[str, Any]:
    """Describe the program's input and outputs."""
    return {
        **describe_model(loaded),
        "tasks": list(loaded.tasks),
        "input": f"{INPUT}; normalised inside with mean and std (on the 0..1 scale)",
        "takes": str(shape),
        "frame": list(shape.frame),
        "any_size": shape.any_size,
        "any_batch": shape.any_batch,
    }


@torch.inference_mode()
def check(run: Run, loaded: LoadedModel, shape: InputSpec, name: str) -> float:
    """The largest difference between the program and the model as it is evaluated; beyond the tolerance the program is
    :class:`ExportError`."""
    worst = 0.0
    for count, height, width in shape.examples():
        pictures = smooth_random_images(count, height, width)
        batch = collate([Sample(str(i), p, {}) for i, p in enumerate(pictures)], {}, (height, width), 1)
        raw = batch["image"].float()
        image, _ = prepare_batch(batch, loaded.model.mean, loaded.model.std, "cpu")
        raw_eager = loaded.model.predict(image)
        eager = {name: clip_prediction(task, raw_eager[name]) for name, task in loaded.tasks.items()}
        try:
            found = run(raw)
        except Exception as error:  # of the runtime
            raise ExportError(first_line(error)) from error
        for task in loaded.tasks:
            if found[task].shape != eager[task].shape:
                raise ExportError(f"{task} comes out as {tuple(found[task].shape)}")
            difference = relative_difference(found[task], eager[task])
            worst = max(worst, difference)
            if not difference <= TOLERANCE:  # nor where it is not a number
                raise ExportError(
                    f"{name}, run at {count} x {height} x {width}, gives another {task} than the model, by "
                    f"{difference:.1e}, more than {TOLERANCE:.0e}"
                )
    return worst


def smooth_random_images(count: int, height: int, width: int) -> list[np.ndarray]:
    """Random pictures uint8 (H, W, 3), smooth as photographs are, with some grain. White noise is no test: its means
    over areas are all the same, and what a network makes of their differences drowns in rounding.
    """
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (count, -(-height // 32) + 1, -(-width // 32) + 1, 3)).astype(np.float32)
    smooth = [cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]
    return [(s + generator.normal(0, 8, s.shape)).clip(0, 255).astype(np.uint8) for s in smooth]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest value of ``b`` where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()


def first_line(error: BaseException) -> str:
    return re.sub(r"\x1b\[\d*m", "", str(error)).strip().split("\n")[0][:300] or type(error).__name__


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Exporters chat a lot, and none of it is for who exports."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# The hub


def push(folder: Path, name: str, private: bool = False) -> str:
    """Publish an exported folder as ``name`` (user/model); its address."""
    if not HUB_ID.fullmatch(name):
        raise UserError(f"push={name} is no name on the hub; give USER/NAME")
    for file in (METADATA_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"folder={folder} has no {file}; make it with export.py format=safetensors")
    library = import_hub(f"push={name}")
    api = library.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"push={name} is there already, and public; make it private on the hub, or choose another")
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(HUB_FILES)))
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, library.errors.LocalTokenNotFoundError):
            raise UserError(
                f"push={name}: the hub asks for a token that may write there; hf auth login, or set HF_TOKEN"
            ) from error
        raise UserError(
            f"push={name}: the hub did not take it ({first_line(error)}); check the connection and the name"
        ) from error
