"""Predict all tasks of a trained model for your own images: no labels, no dataset.

    mtcl predict CHECKPOINT INPUT --output FOLDER [options]

CHECKPOINT: a .pt file, a run's folder, an exported folder, a name on the Hugging Face hub, or "rooms", the small model
of procedural rooms that comes with mtcl. INPUT: an image, a folder of images (with all below it, but for what is hidden
or was written by this command), a video, or a camera's number (0; until Ctrl-C). Written, per image NAME, without
replacing anything (--overwrite does):

FOLDER/semseg/NAME.png   classes (human_parts, sal alike): 8-bit numbers, with the colours of the panel as palette
FOLDER/depth/NAME.png    16 bits, millimetres (65535: that or more)
FOLDER/normals/NAME.png  3 x 8 bits: v stands for 2 v / 255 - 1; red: left, green: up, blue: to the viewer
FOLDER/edge/NAME.png     8 bits, 255 times the probability, smoothed and thinned to lines (non-maximum suppression)
FOLDER/panel/NAME.jpg    the image with all of them in colours; --no-panel leaves it out
FOLDER/predict.json      what was done, with the classes' names and the depth's scale

The same command again continues where it was interrupted (a video starts afresh). A video gives FOLDER/NAME.mp4, the
image and all tasks side by side (and with --save-frames the maps of every frame, NAME/000000 and so on).

A file that can't be predicted is named and skipped; the others are done, and the exit code is then 1.
"""

import argparse
import os
from pathlib import Path

from mtcl.cli.arguments import BACKBONE_WEIGHTS_HELP, name_list, number_list, output_path, positive_float, positive_int
from mtcl.cli.predict.find_images import find_images
from mtcl.cli.predict.images import predict_images
from mtcl.cli.predict.output import Settings, check_links, output_names
from mtcl.cli.predict.record import Job, PredictionRecord, describe_predictions
from mtcl.cli.predict.videos import predict_video
from mtcl.config.load import build_predictor, load_model
from mtcl.errors import UserError
from mtcl.inference.predictor import MODES
from mtcl.safe_files import open_regular

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp"
)  # fmt: skip
PREDICTOR_OPTIONS = ("tasks", "mode", "flip", "scales", "device", "precision")
MAX_CAMERA = 999


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl predict``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("input", metavar="INPUT", help="an image, a folder, a video, or a camera's number")
    parser.add_argument("--output", type=output_path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", type=name_list, metavar="TASK,...", help="only these, default: all of the model")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="how images much larger than the training frame are predicted, default: resize",
    )
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    parser.add_argument("--scales", type=number_list, metavar="X,...", help="average over sizes, such as 0.75,1,1.25")
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="images of one size at once, default: 1"
    )
    parser.add_argument("--seconds", type=positive_float, metavar="S", help="of a video or camera at most")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--no-panel", action="store_false", dest="panel", help="write no image with all tasks")
    parser.add_argument("--save-frames", action="store_true", help="write the maps of every frame of a video")
    parser.add_argument("--backbone-weights", metavar="FILE|hub", help=BACKBONE_WEIGHTS_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace what was written before")


def run(args: argparse.Namespace) -> None:
    """Predict and write what the arguments ask for."""
    options = {key: getattr(args, key) for key in PREDICTOR_OPTIONS if getattr(args, key) is not None}
    settings = Settings(**{key: getattr(args, key) for key in Settings._fields})
    if settings.output.is_file():
        raise UserError(f"--output {settings.output} is a file; give a folder")
    check_links(settings.output)
    path, is_camera = Path(args.input), args.input.isdecimal()
    is_video = path.suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path) and os.path.exists(path)
    if is_video:
        open_regular(path).close()  # OpenCV would wait for a FIFO
    files, unreadable = ([], {}) if is_camera or is_video else find_images(path, settings.output)
    if is_camera and int(args.input) > MAX_CAMERA:
        raise UserError(
            f"INPUT {args.input}: a camera's number is at most {MAX_CAMERA}; for a file of that name, ./{args.input}"
        )
    loaded = load_model(args.checkpoint, args.backbone_weights)
    predictor = build_predictor(loaded, **options)
    job = Job(predictor, settings, PredictionRecord(settings, args.input, describe_predictions(loaded, predictor)))
    if is_camera:
        predict_video(int(args.input), f"camera_{int(args.input)}", job)
    elif is_video:
        predict_video(args.input, path.stem, job)
    else:
        predict_images(output_names(files, path), unreadable, job)
