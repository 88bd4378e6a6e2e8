"""Known facts about each dataset that the verification compares with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtcl.data.datasets.base import FileDataset
from mtcl.data.datasets.mtan import NYUD13, CityscapesMTL
from mtcl.data.datasets.nyud import NYUD
from mtcl.data.datasets.nyud import ROOTS as NYUD_ROOTS
from mtcl.data.datasets.pascal_context import ROOTS as PASCAL_ROOTS
from mtcl.data.datasets.pascal_context import PascalContext
from mtcl.data.image_io import read_bytes
from mtcl.data.prepare.jobs import STAMP_FILE
from mtcl.errors import UserError
from mtcl.tasks import CITYSCAPES7, NYUD40, VOC21
from mtcl.tasks import NYUD13 as NYUD13_NAMES

SMALL_VAL = 500  # test frames of the small edition


class Unchecked:
    """Accepts missing files, which the verification counts itself; a base before a dataset's class."""

    def check_files(self, layout: str) -> None:
        """Accept missing files."""


class UncheckedNYUD(Unchecked, NYUD):
    """NYUD-v2 without the check for missing files."""


class UncheckedPascalContext(Unchecked, PascalContext):
    """PASCAL-Context without the check for missing files."""


class UncheckedNYUD13(Unchecked, NYUD13):
    """NYUv2 in MTAN's layout without the check for missing files."""


class UncheckedCityscapesMTL(Unchecked, CityscapesMTL):
    """Cityscapes in MTAN's layout without the check for missing files."""


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one dataset."""

    title: str
    dataset_class: type[FileDataset]
    roots: tuple[str, ...]  # the archives' own folders
    lists: str  # the folder of the lists; of a numbered dataset, one that it has and others lack
    official: Mapping[str, int]  # list -> images
    sizes: frozenset[tuple[int, int]]  # height, width of the official images; empty: see `longest`
    longest: int  # most pixels of an image's longer side; 0: see `sizes`
    classes: tuple[str, ...]  # of semseg
    shares: tuple[float, ...] = ()  # known pixel shares of the first classes
    most: tuple[str, str] | None = None  # the most frequent class, and the most frequent other one
    floor: int | None = None  # the class whose normals point up
    indoors: bool = False  # seen from inside: what is to the left faces right
    numbered: bool = False  # no lists: the images of train and val are numbered from 0
    known_axes: bool = True  # of normals: left, up, to the viewer
    inverse_depth: bool = False
    known_deviations: Mapping[str, str] = field(default_factory=dict)  # name of a check -> explanation
    notes: tuple[str, ...] = ()  # what no check can see


# Pixel shares of classes 1 to 39 in the 795 training frames of the small edition, void excluded; its source has no
# class 40. Printed by: python scripts/verify_data.py ROOT --frequencies
# fmt: off
NYUD_SHARES = (
    0.25548, 0.12331, 0.08638, 0.04985, 0.04881, 0.03338, 0.02916, 0.02450, 0.02602, 0.02492, 0.02367, 0.01872, 0.01939,
    0.01407, 0.01631, 0.01164, 0.01292, 0.01158, 0.01256, 0.00872, 0.01162, 0.01009, 0.00744, 0.00687, 0.00777, 0.00504,
    0.00460, 0.00487, 0.00567, 0.00364, 0.00408, 0.00370, 0.00418, 0.00353, 0.00375, 0.00309, 0.00296, 0.02891, 0.02677,
)
# fmt: on

_NYUD = DatasetFacts(
    title="NYUD-v2",
    dataset_class=UncheckedNYUD,
    roots=NYUD_ROOTS,
    lists="gt_sets",
    official={"train": 795, "val": 654},
    sizes=frozenset({(425, 560), (480, 640)}),
    longest=0,
    classes=NYUD40,
    shares=NYUD_SHARES,
    floor=NYUD40.index("floor"),
    indoors=True,
)

_SMALL = {
    "list val": "the small edition has 500 of the 654 official test frames",
    "image sizes": "the small edition is shrunk to 192x256 (height x width)",
    "semseg classes": "the small edition's source merges class 40 (otherprop) and void",
    "normals length": "the small edition's normals are not all of unit length; training makes them so",
    "depth levels": "the small edition's source keeps depth in 8 bits, in steps of 39 mm",
}

FACTS: Mapping[str, DatasetFacts] = {
    "nyud": _NYUD,
    "nyud_small": DatasetFacts(
        **{
            **vars(_NYUD),
            "title": "NYUD-v2, small edition",
            "known_deviations": _SMALL,
            "notes": ("normals: the small edition's are planes fitted to its depth (pseudo-normals)",),
        }
    ),
    "pascal": DatasetFacts(
        title="PASCAL-Context",
        dataset_class=UncheckedPascalContext,
        roots=PASCAL_ROOTS,
        lists="ImageSets/Context",
        official={"train": 4998, "val": 5105},
        sizes=frozenset(),
        longest=500,
        classes=VOC21,
        # No shares of our own were measured. That most pixels are background and most objects persons, VOC's own
        # statistics say (Table 1 of its development kit counts objects, and persons are by far the most).
        most=("background", "person"),
    ),
    "nyuv2_13": DatasetFacts(
        title="NYUv2 in MTAN's layout",
        dataset_class=UncheckedNYUD13,
        roots=NYUD13.roots,
        lists="train/normal",
        official={"train": 795, "val": 654},
        sizes=frozenset({(288, 384)}),
        longest=0,
        classes=NYUD13_NAMES,
        numbered=True,
        known_axes=False,
        notes=("normals: the axes of MTAN's release are not documented and not checked; flips negate the first one",),
    ),
    "cityscapes_mtl": DatasetFacts(
        title="Cityscapes in MTAN's layout",
        dataset_class=UncheckedCityscapesMTL,
        roots=CityscapesMTL.roots,
        lists="train/image",
        official={"train": 2975, "val": 500},
        sizes=frozenset({(128, 256)}),
        longest=0,
        classes=CITYSCAPES7,
        numbered=True,
        inverse_depth=True,
        notes=("semseg: the labels of 7 classes were checked (label_7, else label), those of 19 were not",),
    ),
}


def find_dataset(folder: Path, name: str | None) -> tuple[str, Path]:
    """Return (key of FACTS, folder) of the dataset in ``folder`` or in an archive's own folder there.

    Args:
        folder: the dataset's folder or its parent.
        name: key of FACTS; None recognises the dataset.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the one that holds a dataset.")
    names = list(FACTS) if name is None else [name]
    for candidate in names:
        facts = FACTS[candidate]
        for candidate_folder in (*(folder / root for root in facts.roots), folder):
            if (candidate_folder / facts.lists).is_dir():
                return (
                    _edition(candidate_folder) if name is None and candidate == "nyud" else candidate
                ), candidate_folder
    expected = " or ".join(sorted({FACTS[candidate].lists for candidate in names}))
    raise UserError(f"{folder} has no folder {expected}; give the folder that holds a dataset's lists and images.")


def _edition(folder: Path) -> str:
    """Return the small edition if the validation list is as long as its own and no command of ours wrote the folder."""
    path = folder / "gt_sets" / "val.txt"
    lines = read_bytes(path).split() if path.is_file() else []
    return "nyud_small" if len(lines) == SMALL_VAL and not (folder / STAMP_FILE).is_file() else "nyud"
