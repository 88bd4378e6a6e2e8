"""Convert the official VOC2010, PASCAL-Context and PASCAL-Part releases to the folder that data=pascal reads.

python scripts/prepare_pascal.py --voc VOCdevkit/VOC2010 --context DIR --parts DIR --out data/PASCALContext
"""

from pathlib import Path

from mtcl.cli.arguments import CommandParser, add_workers_option
from mtcl.cli.prepared import format_prepared
from mtcl.cli.script import run
from mtcl.data.prepare.pascal import prepare_pascal

OPTIONS = {
    "--voc": "VOC2010 as unpacked: has JPEGImages, SegmentationClass and ImageSets/Main",
    "--context": "PASCAL-Context as unpacked: has trainval/<id>.mat (459 classes)",
    "--out": "the folder to write; a second run continues where the first was stopped",
    "--parts": "PASCAL-Part as unpacked: has Annotations_Part/<id>.mat; human_parts needs it",
    "--voc-labels": "the VOC folder whose SegmentationClass is used, e.g. VOC2012's, which has more (default: --voc)",
    "--normals": "has normals_distill/<id>.png of the published archive; no official release has them",
    "--saliency": "has sal_distill/<id>.png of the published archive; no official release has them",
}
REQUIRED = ("--voc", "--context", "--out")


def main() -> None:
    """Parse the command line, convert, and print a summary."""
    parser = CommandParser(__doc__)
    for option, help_text in OPTIONS.items():
        parser.add_argument(option, type=Path, metavar="DIR", required=option in REQUIRED, help=help_text)
    parser.add_argument("--link", action="store_true", help="symbolic links (absolute) to the releases, not copies")
    add_workers_option(parser, most=8)
    print(format_prepared(prepare_pascal(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run(main)
