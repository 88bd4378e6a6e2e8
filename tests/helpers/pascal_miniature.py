"""PASCAL-Context of a few tiny images, written as the official releases and as the final layout.

``write_devkit`` writes what one downloads (VOCdevkit, PASCAL-Context, PASCAL-Part), ``write_archive`` what the
reader reads; both return the arrays that they wrote. The same ids always give the same arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import scipy.io
from PIL import Image

from mtcl.data.datasets.pascal_classes import PART_NAME_TO_ID, PERSON, VOC_TO_CONTEXT

TRAIN = ("2008_000008", "2008_000003", "2009_000015", "2010_000027")  # not sorted, as a list may be
VAL = ("2008_000002", "2010_000500", "2009_000016", "2008_000111")
SIZES = ((24, 32), (31, 20), (20, 33), (27, 27), (24, 32))  # (height, width), by position
DOG, AEROPLANE = 12, 1
NAMES = {PERSON: "person", DOG: "dog", AEROPLANE: "aeroplane"}
# The context classes; NORMALS_CLASSES has person, dog and wall, and not aeroplane and sky.
CONTEXT_PERSON, CONTEXT_DOG, CONTEXT_AEROPLANE = (VOC_TO_CONTEXT[kind - 1] for kind in (PERSON, DOG, AEROPLANE))
WALL, SKY = 440, 360


@dataclass(frozen=True)
class Object:
    """One entry of PASCAL-Part's `objects`: masks are uint8 (H, W) in {0, 1}."""

    kind: int  # VOC's class, 1 to 20; 15 is a person
    mask: np.ndarray
    parts: tuple[tuple[str, np.ndarray], ...]  # (name, mask) in file order; empty: the file holds `[]`


@dataclass(frozen=True)
class Picture:
    """All that is known of one image."""

    id: str
    jpeg: bytes
    image: np.ndarray  # uint8 RGB (H, W, 3): what OpenCV decodes from `jpeg`
    context: np.ndarray  # uint16 (H, W): LabelMap, 1 to 459 (0: see `unlabelled`)
    voc: np.ndarray | None  # uint8 (H, W): 0 to 20 and 255; None where VOC has no segmentation
    from_context: np.ndarray  # uint8 (H, W): `context` as VOC's classes, 255 where it is 0
    objects: tuple[Object, ...]
    normals: np.ndarray  # uint8 RGB (h, w, 3), of the image's size unless `distilled` says another
    saliency: np.ndarray  # uint8 (h, w), likewise; 127 and 128 occur

    @property
    def semseg(self) -> np.ndarray:
        """The label that counts: uint8 (H, W)."""
        return self.from_context if self.voc is None else self.voc


def image(name: str, position: int, distilled: tuple[int, int] | None = None, unlabelled: bool = False) -> Picture:
    """The image at ``position`` of all the ids; what is on it goes in a circle of four.

    0: two persons with overlapping parts, the second one painted over the first; VOC label.
    1: a person without parts; no VOC label.
    2: no person, but a dog with parts (whose names persons have too) and an aeroplane without; VOC label.
    3: a dog, a person with each part there is (neighbours overlap) and a person without parts; no VOC label.

    ``distilled`` is (height, width) of the normals and the saliency; ``unlabelled`` gives LabelMap a corner of 0.
    """
    rng = np.random.default_rng([position, *name.encode()])
    height, width = size = SIZES[position % len(SIZES)]
    case = position % 4
    smooth = cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", smooth)[1]
    context = np.full(size, WALL, np.uint16)
    context[: height // 3] = SKY
    context[2 * height // 3 :, : width // 2] = CONTEXT_AEROPLANE if case == 2 else CONTEXT_DOG
    if case != 2:
        context[height // 4 : height // 2, width // 2 :] = CONTEXT_PERSON
    if unlabelled:
        context[-3:, -4:] = 0
    voc = np.zeros(size, np.uint8)
    voc[3:9, 4:15] = DOG if case == 2 else PERSON
    voc[10:15, 2:9] = 20
    voc[2:16, 15] = voc[15, 2:16] = 255
    small = distilled or size
    return Picture(
        name,
        jpeg.tobytes(),
        cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB),
        context,
        voc if case in (0, 2) else None,
        _as_voc(context),
        _objects(case, size),
        rng.integers(0, 256, (*small, 3), dtype=np.uint8),
        rng.choice(np.uint8([0, 127, 128, 255]), small),
    )


def write_archive(
    root: Path,
    ids_train: Sequence[str] = TRAIN,
    ids_val: Sequence[str] = VAL,
    *,
    distilled: tuple[int, int] | None = None,
    unlabelled: bool = False,
) -> dict[str, Picture]:
    """Write the final layout into ``root`` (which becomes ``PASCALContext`` itself); id -> what was written.

    semseg/pascal-context has every id, also those with a (different) VOC label, which counts. VOC labels are PNGs
    with a palette, the others are grey. tune_train is all but the last training id, tune_val the last one. Keywords:
    see :func:`image`; ids go round its four cases, training ids first.
    """
    images = _pictures(ids_train, ids_val, distilled, unlabelled)
    for name, shown in images.items():
        _write_bytes(root / "JPEGImages" / f"{name}.jpg", shown.jpeg)
        if shown.voc is not None:
            write_palette(root / "semseg" / "VOC12" / f"{name}.png", shown.voc)
        write_png(root / "semseg" / "pascal-context" / f"{name}.png", shown.from_context)
        write_context(root / "pascal-context" / "trainval" / f"{name}.mat", shown.context)
        write_parts(root / "human_parts" / f"{name}.mat", name, shown.objects)
        write_png(root / "normals_distill" / f"{name}.png", shown.normals)
        write_png(root / "sal_distill" / f"{name}.png", shown.saliency)
    lists = {"train": ids_train, "val": ids_val, "tune_train": ids_train[:-1], "tune_val": ids_train[-1:]}
    for part, ids in lists.items():
        write_list(root / "ImageSets" / "Context" / f"{part}.txt", ids)
    return images


@dataclass(frozen=True)
class Devkit:
    """Where :func:`write_devkit` put things, and what."""

    images: Mapping[str, Picture]
    voc: Path  # VOCdevkit/VOC2010; it lacks the VOC label of the last image that has one
    labels: Path  # VOCdevkit/VOC2012; has all VOC labels, and one of an image that is in no list
    context: Path  # PASCAL-Context as unpacked: trainval/<id>.mat and labels.txt
    parts: Path  # PASCAL-Part as unpacked: Annotations_Part/<id>.mat
    distilled: Path  # normals_distill/<id>.png and sal_distill/<id>.png


def write_devkit(
    root: Path,
    ids_train: Sequence[str] = TRAIN,
    ids_val: Sequence[str] = VAL,
    *,
    distilled: tuple[int, int] | None = None,
    unlabelled: bool = False,
) -> Devkit:
    """Write the official releases under ``root``, with the lists and labels that a converter must not take.

    Keywords: see :func:`image`; ids go round its four cases, training ids first.
    """
    devkit = root / "VOCdevkit"
    kit = Devkit(
        _pictures(ids_train, ids_val, distilled, unlabelled),
        devkit / "VOC2010",
        devkit / "VOC2012",
        root / "context",
        root / "parts",
        root / "distilled",
    )
    labelled = [name for name, shown in kit.images.items() if shown.voc is not None]
    for name, shown in kit.images.items():
        _write_bytes(kit.voc / "JPEGImages" / f"{name}.jpg", shown.jpeg)
        if shown.voc is not None:
            write_palette(kit.labels / "SegmentationClass" / f"{name}.png", shown.voc)
            if name != labelled[-1]:
                write_palette(kit.voc / "SegmentationClass" / f"{name}.png", shown.voc)
        write_context(kit.context / "trainval" / f"{name}.mat", shown.context)
        write_parts(kit.parts / "Annotations_Part" / f"{name}.mat", name, shown.objects)
        write_png(kit.distilled / "normals_distill" / f"{name}.png", shown.normals)
        write_png(kit.distilled / "sal_distill" / f"{name}.png", shown.saliency)
    write_palette(kit.labels / "SegmentationClass" / "2011_000003.png", np.zeros((9, 9), np.uint8))
    _write_bytes(kit.context / "labels.txt", b"1: accordion\n2: aeroplane\n")
    for part, ids in {"train": ids_train, "val": ids_val, "trainval": [*ids_train, *ids_val]}.items():
        write_list(kit.voc / "ImageSets" / "Main" / f"{part}.txt", ids)
        write_list(kit.voc / "ImageSets" / "Main" / f"dog_{part}.txt", [f"{name} -1" for name in ids])
        write_list(kit.voc / "ImageSets" / "Segmentation" / f"{part}.txt", ids[:1])
    return kit


def write_context(path: Path, labels: np.ndarray) -> None:
    """A LabelMap as PASCAL-Context's files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"LabelMap": labels}, do_compression=True)


def write_parts(path: Path, name: str, objects: Sequence[Object]) -> None:
    """An `anno` as PASCAL-Part's files are: a structure of structures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = _structures(
        ("class", "class_ind", "mask", "parts"),
        [
            (
                NAMES[one.kind],
                np.uint8(one.kind),
                one.mask,
                _structures(("part_name", "mask"), one.parts) if one.parts else np.zeros((0, 0)),
            )
            for one in objects
        ],
    )
    anno = _structures(("imname", "objects"), [(name, listed)])
    scipy.io.savemat(path, {"anno": anno}, do_compression=True)


def write_palette(path: Path, indices: np.ndarray) -> None:
    """uint8 (H, W) as a PNG whose colours come from a palette, as VOC's labels are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())  # turns L into P
    image.save(path)


def write_png(path: Path, array: np.ndarray) -> None:
    """uint8 (H, W) grey or RGB (H, W, 3) as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def write_list(path: Path, lines: Sequence[str]) -> None:
    _write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _pictures(
    ids_train: Sequence[str], ids_val: Sequence[str], distilled: tuple[int, int] | None, unlabelled: bool
) -> dict[str, Picture]:
    return {name: image(name, position, distilled, unlabelled) for position, name in enumerate([*ids_train, *ids_val])}


def _structures(fields: Sequence[str], rows: Sequence[Sequence[object]]) -> np.ndarray:
    """A MATLAB structure array (1, n) with these fields."""
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        array[0, column] = tuple(row)
    return array


def _as_voc(context: np.ndarray) -> np.ndarray:
    classes = np.zeros(context.shape, np.uint8)
    classes[context == 0] = 255
    for number, label in enumerate(VOC_TO_CONTEXT, start=1):
        classes[context == label] = number
    return classes


def _objects(case: int, size: tuple[int, int]) -> tuple[Object, ...]:
    def box(top: int, bottom: int, left_edge: int, right: int) -> np.ndarray:
        mask = np.zeros(size, np.uint8)
        mask[top:bottom, left_edge:right] = 1
        return mask

    whole_left, whole_right = box(1, 19, 1, 9), box(1, 19, 5, 18)
    if case == 0:
        first = (("torso", box(5, 12, 2, 8)), ("head", box(1, 6, 3, 7)), ("leye", box(2, 3, 4, 5)))
        first += (("luarm", box(6, 9, 1, 4)), ("llarm", box(8, 12, 1, 3)), ("ruleg", box(11, 16, 3, 6)))
        second = (("head", box(2, 7, 6, 10)), ("neck", box(6, 8, 6, 9)), ("torso", box(7, 13, 5, 12)))
        second += (("rhand", box(10, 12, 11, 14)), ("lfoot", box(17, 19, 5, 8)))
        return Object(PERSON, whole_left, first), Object(PERSON, whole_right, second)
    dog = Object(DOG, box(9, 18, 8, 17), (("head", box(9, 12, 8, 12)), ("tail", box(13, 14, 15, 17))))
    bare = Object(PERSON, whole_left, ())
    if case == 1:
        return (bare,)
    if case == 2:
        return dog, Object(AEROPLANE, whole_left, ())
    corners = ((1 + 3 * (i // 4), 1 + 4 * (i % 4)) for i in range(len(PART_NAME_TO_ID)))
    others = tuple(
        (name, box(top, top + 4, left_edge, left_edge + 5)) for name, (top, left_edge) in zip(PART_NAME_TO_ID, corners)
    )
    return dog, Object(PERSON, whole_right, others), bare
