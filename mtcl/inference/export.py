"""Export a trained model as a program of ``torch.export`` or ONNX, checked against the model before it is kept."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from mtcl.data import Sample, prepare_batch
from mtcl.data.loader import collate
from mtcl.errors import UserError
from mtcl.inference import recipe
from mtcl.inference.model_files import METADATA_FILE, ONNX_FILE, PROGRAM_FILE, RECIPE_FILE
from mtcl.inference.predictor import RESIZE_THRESHOLD, SIZE_MULTIPLE
from mtcl.models import DenseModel
from mtcl.tasks.base import Task
from mtcl.version import __version__

PROGRAM_FORMATS = ("torch", "onnx")
TOLERANCE = 1e-4  # of an exported model's outputs, times the output's largest value where that is above 1
MAX_MULTIPLES = 256  # multiples of a side that a program is made for; images of a batch, too
MIN_TRACED_MULTIPLES = 6  # tracers take a map of a single row or column for a rule
INPUT = "float32 (batch, 3, height, width), RGB, 0..255, not normalised"
UNITS = {"metres": "m", "probability": "1"}  # by a task's prediction type; of the decoded outputs
RAW_MEANINGS = {  # what a raw prediction means, by a task's prediction type
    "class": "logits of the classes; the class is the argmax over channels",
    "metres": "metres, negative ones clipped to 0",
    "inverse_depth": "inverse depth in the unit of the labels, negative ones clipped to 0",
    "direction": "vectors to be normalised; x to the left, y up, z to the viewer",
    "probability": "a logit; its sigmoid is the probability",
}


class TrainedModel(NamedTuple):
    """A model in evaluation mode, on the CPU, with what describes it."""

    model: DenseModel
    tasks: Mapping[str, Task]
    size: tuple[int, int]  # (height, width) of the training frame
    step: int


class ExportModule(nn.Module):
    """Normalisation, model, and depth clipped at 0, as one module.

    It maps images as :data:`INPUT` to task -> raw prediction (B, C, H, W), float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: DenseModel, tasks: Mapping[str, Task]):
        super().__init__()
        self.model, self.tasks = model, dict(tasks)
        for name, values in (("mean", model.mean), ("std", model.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return each task's raw prediction."""
        raw = self.model.predict((image - self.mean) / self.std)
        return {name: clip_prediction(task, raw[name]) for name, task in self.tasks.items()}


def clip_prediction(task: Task, raw: Tensor) -> Tensor:
    """Clip depth at 0, as every metric and ``mtcl.load`` do."""
    return raw.clamp(min=0) if task.prediction_type in ("metres", "inverse_depth") else raw


class InputSpec(NamedTuple):
    """Sizes that an exported program takes."""

    frame: tuple[int, int]  # (height, width) of images up to the training frame's size; no smaller input is needed
    multiple: int  # of height and width
    any_batch: bool
    any_size: bool

    def __str__(self) -> str:
        height, width = self.frame
        sides = f"any height and width that are multiples of {self.multiple}, from {height} x {width} on"
        sides = sides if self.any_size else f"images of {height} x {width} only"
        return f"{f'batches up to {MAX_MULTIPLES}' if self.any_batch else 'one image at a time'}, {sides}"

    def examples(self) -> list[tuple[int, int, int]]:
        """Return (batch, height, width) that a program is checked at: several of each where it takes them."""
        height, width = self.frame
        shapes = [(1, height, width)] + [(3, height, width)] * self.any_batch
        if self.any_size:
            count, square = (2 if self.any_batch else 1), max(self.frame)
            shapes += [(count, height + self.multiple, width + 2 * self.multiple), (count, square, square)]
        return shapes


RunProgram = Callable[[Tensor], Mapping[str, Tensor]]
SavedProgram = tuple[str, RunProgram]  # the file's name, and a function that runs it


class ExportError(Exception):
    """A program can't be made or run for all sizes of its :class:`InputSpec`."""


def export_program(trained: TrainedModel, format: str, folder: Path, fixed_size: bool = False) -> str:
    """Write a program for the widest :class:`InputSpec` that the model's operations allow.

    Args:
        trained: The model.
        format: One of :data:`PROGRAM_FORMATS`.
        folder: An empty folder.
        fixed_size: Export for the training frame's size only.

    Returns:
        A sentence on the program.

    Raises:
        UserError: The model can't be exported.
    """
    save_program = {"torch": save_torch_program, "onnx": save_onnx_program}[format]
    specs, reason = list_input_specs(trained, fixed_size)
    error: Exception | None = None
    for spec in specs:
        try:
            with silence_exporters():
                program = trace(ExportModule(trained.model, trained.tasks).eval(), spec)
                count = count_parameters(program, trained.model)
                name, run = save_program(program, trained, spec, folder)
                difference = check_program(run, trained, spec, name)
            (folder / RECIPE_FILE).write_text(Path(recipe.__file__).read_text("utf-8"), "utf-8")
            limits = "" if spec.any_size else f" ({reason})"
            return (
                f"{name} takes {spec}{limits}; outputs differ from PyTorch's by at most {difference:.1e}; {count:,} "
                "parameters, all of them the model's"
            )
        except ExportError as problem:
            error = problem
            reason = first_line(problem) if spec.any_size else reason
            for path in folder.iterdir():
                path.unlink()
    assert error is not None
    raise UserError(f"this model can't be exported so: {first_line(error)}") from error


def list_input_specs(trained: TrainedModel, fixed_size: bool) -> tuple[list[InputSpec], str]:
    """Return the specs to try, widest first, and the reason where they are of one size."""
    multiple = trained.model.backbone.multiple
    minimum = tuple(recipe.round_up(side, multiple) for side in trained.size)
    reason = "as asked for" if fixed_size else "its operations can't be exported for other sizes"
    if has_windows(trained.model):
        fixed_size, reason = True, "its backbone cuts images into windows whose number is fixed in a traced program"
    elif min(minimum) == multiple:
        fixed_size = True
        reason = f"a side of its training frame is a single {multiple}, which a tracer takes for a rule"
    # An image of the training frame's size is rounded up before the backbone's multiple is.
    frame = tuple(recipe.round_up(recipe.round_up(side, SIZE_MULTIPLE), multiple) for side in trained.size)
    specs = [] if fixed_size else [InputSpec((minimum[0], minimum[1]), multiple, True, True)]
    specs += [InputSpec((frame[0], frame[1]), multiple, any_batch, False) for any_batch in (True, False)]
    return specs, reason


def count_parameters(program: torch.export.ExportedProgram, model: DenseModel) -> int:
    """Count the parameters; ``UserError`` where some are not the model's (a regulariser's)."""
    foreign = set(program.state_dict) - {f"model.{name}" for name in model.state_dict()}
    if foreign:
        raise UserError(f"the exported program holds {min(foreign)}, which is none of its weights; nothing was written")
    return sum(parameter.numel() for parameter in program.parameters())


def has_windows(model: DenseModel) -> bool:
    """Tell whether this is a Swin or alike; tracing these for any size takes very long and fails."""
    return any(hasattr(module, "window_size") for module in model.backbone.modules())


def trace(module: nn.Module, spec: InputSpec) -> torch.export.ExportedProgram:
    """Trace a module for all sizes of the spec."""
    height, width = spec.frame
    dynamic: dict[int, Any] = {}
    if spec.any_batch:
        dynamic[0] = Dim("batch", min=1, max=MAX_MULTIPLES)
    if spec.any_size:
        names = ("rows", "columns")
        for i, (name, side) in enumerate(zip(names, spec.frame)):
            dynamic[2 + i] = spec.multiple * Dim(name, min=side // spec.multiple, max=MAX_MULTIPLES)
        height, width = (max(side, MIN_TRACED_MULTIPLES * spec.multiple) for side in spec.frame)
        width += spec.multiple * (height == width)  # a square would be taken for a rule
    example = torch.zeros(2 if spec.any_batch else 1, 3, height, width)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is traced for one size of batch only
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # many kinds
        raise ExportError(first_line(error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def save_torch_program(
    program: torch.export.ExportedProgram, trained: TrainedModel, spec: InputSpec, folder: Path
) -> SavedProgram:
    """Write a program as ``torch.export.load`` reads it."""
    path = folder / PROGRAM_FILE
    metadata = describe_program(trained, spec)
    try:
        buffer = io.BytesIO()  # written to the disk, it would hide the disk's errors
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    except Exception as error:  # an operation on sizes that can be traced, but not written (a ViT's: ceil)
        raise ExportError(first_line(error)) from error
    path.write_bytes(buffer.getbuffer())
    return PROGRAM_FILE, torch.export.load(path).module()


def save_onnx_program(
    program: torch.export.ExportedProgram, trained: TrainedModel, spec: InputSpec, folder: Path
) -> SavedProgram:
    """Write a program as ONNX."""
    import onnxruntime

    path = folder / ONNX_FILE
    try:
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=list(trained.tasks)
        )
        assert onnx_program is not None
    except Exception as error:  # many kinds
        raise ExportError(first_line(error)) from error
    metadata = describe_program(trained, spec)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx_program.model.metadata_props.update({**texts, METADATA_FILE: json.dumps(metadata)})
    onnx_program.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(first_line(error)) from error

    def run(image: Tensor) -> dict[str, Tensor]:
        outputs = session.run(list(trained.tasks), {"image": image.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(trained.tasks, outputs)}

    return ONNX_FILE, run


def describe_model(trained: TrainedModel) -> dict[str, Any]:
    """Describe the model's input and outputs, as programs and exported folders hold it."""
    return {
        "mtcl": __version__,
        "step": trained.step,
        "classes": {name: list(getattr(task, "classes", ())) for name, task in trained.tasks.items()},
        "kinds": {name: task.prediction_type for name, task in trained.tasks.items()},
        "outputs": {name: RAW_MEANINGS[task.prediction_type] for name, task in trained.tasks.items()},
        "units": {name: UNITS.get(task.prediction_type, "") for name, task in trained.tasks.items()},
        "mean": round_values(trained.model.mean),
        "std": round_values(trained.model.std),
        "size": list(trained.size),
        "rounding": SIZE_MULTIPLE,
        "multiple": trained.model.backbone.multiple,
        "as_it_is": RESIZE_THRESHOLD,
    }


def describe_program(trained: TrainedModel, spec: InputSpec) -> dict[str, Any]:
    """Describe the program's input and outputs."""
    return {
        **describe_model(trained),
        "tasks": list(trained.tasks),
        "input": f"{INPUT}; normalised inside with mean and std (on the 0..1 scale)",
        "takes": str(spec),
        "frame": list(spec.frame),
        "any_size": spec.any_size,
        "any_batch": spec.any_batch,
    }


@torch.inference_mode()
def check_program(run: RunProgram, trained: TrainedModel, spec: InputSpec, name: str) -> float:
    """Return the largest difference between the program and the model as it is evaluated.

    Raises:
        ExportError: It is above the tolerance, or the program fails.
    """
    worst = 0.0
    for count, height, width in spec.examples():
        images = smooth_random_images(count, height, width)
        batch = collate([Sample(str(i), p, {}) for i, p in enumerate(images)], {}, (height, width), 1)
        raw = batch["image"].float()
        image, _ = prepare_batch(batch, trained.model.mean, trained.model.std, "cpu")
        raw_eager = trained.model.predict(image)
        eager = {name: clip_prediction(task, raw_eager[name]) for name, task in trained.tasks.items()}
        try:
            outputs = run(raw)
        except Exception as error:  # of the runtime
            raise ExportError(first_line(error)) from error
        for task in trained.tasks:
            if outputs[task].shape != eager[task].shape:
                raise ExportError(f"{task} comes out as {tuple(outputs[task].shape)}")
            difference = relative_difference(outputs[task], eager[task])
            worst = max(worst, difference)
            if not difference <= TOLERANCE:  # nor where it is not a number
                raise ExportError(
                    f"{name}, run at {count} x {height} x {width}, gives another {task} than the model, by "
                    f"{difference:.1e}, more than {TOLERANCE:.0e}"
                )
    return worst


def smooth_random_images(count: int, height: int, width: int) -> list[np.ndarray]:
    """Return random images uint8 (H, W, 3), smooth as photographs are, with some grain.

    White noise would be no test: its means over areas are all the same, and their differences drown in rounding.
    """
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (count, -(-height // 32) + 1, -(-width // 32) + 1, 3)).astype(np.float32)
    smooth = [cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]
    return [(s + generator.normal(0, 8, s.shape)).clip(0, 255).astype(np.uint8) for s in smooth]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, divided by the largest value of ``b`` where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without colours."""
    return re.sub(r"\x1b\[\d*m", "", str(error)).strip().split("\n")[0][:300] or type(error).__name__


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Silence the warnings and logs of exporters; none of them is for users."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def round_values(values: Sequence[float]) -> list[float]:
    """Round numbers that are written for people and programs."""
    return [round(value, 6) for value in values]
