"""Labels that PASCAL-Context's files hold only indirectly: edges, human parts, where normals count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mtcl.data.datasets.pascal_classes import NORMALS_CLASSES, NUM_CONTEXT, PART_NAME_TO_ID, PERSON
from mtcl.data.image_io import describe_array
from mtcl.errors import UserError

_HAS_NORMALS = np.zeros(NUM_CONTEXT + 1, bool)
_HAS_NORMALS[list(NORMALS_CLASSES)] = True


class Person(NamedTuple):
    """One person of PASCAL-Part; masks (H, W), not 0 on the person or the part."""

    mask: np.ndarray
    parts: tuple[tuple[str, np.ndarray], ...]  # (name, mask) in file order


def validate_context_classes(labels: Any, path: Path) -> np.ndarray:
    """Return a LabelMap read from ``path`` as uint16 (H, W), 0 (nothing) to 459."""
    is_map = isinstance(labels, np.ndarray) and labels.ndim == 2 and labels.size > 0 and labels.dtype.kind in "uif"
    if not is_map or (labels != np.floor(labels)).any():
        raise UserError(
            f"LabelMap in {path} is {describe_array(labels)}, not whole numbers (height, width); unpack it again."
        )
    wrong = labels[(labels < 0) | (labels > NUM_CONTEXT)]
    if wrong.size:
        raise UserError(
            f"LabelMap in {path} holds the class {wrong[0]:g}, but PASCAL-Context has 1 to {NUM_CONTEXT}; unpack it "
            "again."
        )
    return labels.astype(np.uint16)


def validate_voc_classes(values: np.ndarray, path: Path) -> np.ndarray:
    """Return VOC's classes read from ``path``, uint8 (H, W), unchanged: 0 (background) to 20, 255 for void."""
    wrong = values[(values > 20) & (values != 255)]
    if wrong.size:
        raise UserError(f"{path} holds the class {wrong[0]}, but VOC has 0 to 20, and 255 for void; unpack it again.")
    return values


def semantic_edges(classes: np.ndarray) -> np.ndarray:
    """Return the thinned boundaries of a LabelMap, where its Laplacian is not 0: uint8 (H, W) in {0, 1}.

    As InvPT/data/pascal_context.py.
    """
    from skimage.morphology import thin  # here, for it takes a third of a second of every command and worker

    return thin(cv2.Laplacian(classes.astype(np.float64), cv2.CV_64F) != 0).astype(np.uint8)


def has_normals(classes: np.ndarray) -> np.ndarray:
    """Return where distilled normals count, bool (H, W): on the classes that NYU-v2 has, too."""
    return _HAS_NORMALS[classes]


def parse_persons(anno: Any, path: Path) -> list[Person]:
    """Return the persons of PASCAL-Part's structure ``anno``, read from ``path``, in file order; skip other objects."""
    try:
        found_persons = [_person(entry) for entry in anno[0][0][1].ravel() if int(entry[1].item()) == PERSON]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"anno in {path} is not a structure of PASCAL-Part ({error}); unpack it again.") from error
    sizes = {mask.shape for person in found_persons for mask in (person.mask, *(mask for _, mask in person.parts))}
    if len(sizes) > 1:
        sizes_text = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise UserError(
            f"anno in {path} has masks of {sizes_text} pixels (height x width), not of one size; unpack it again."
        )
    return found_persons


def shows_person(persons: Sequence[Person]) -> bool:
    """Return whether any pixel belongs to a person."""
    return any(person.mask.any() for person in persons)


def draw_human_parts(persons: Sequence[Person], size: tuple[int, int], path: Path) -> np.ndarray:
    """Return the standard six parts of all persons as uint8 (H, W), 0 elsewhere; a later part covers earlier ones.

    Without a pixel of a person there are no parts either (InvPT/data/pascal_context.py).
    """
    label = np.zeros(size, np.uint8)
    for name, mask in (part for person in persons for part in person.parts if shows_person(persons)):
        if name not in PART_NAME_TO_ID:
            raise UserError(f"{path} has a person's part {name!r}, which PASCAL-Part does not know; unpack it again.")
        label[mask != 0] = PART_NAME_TO_ID[name]
    return label


def _person(entry: Any) -> Person:
    """Parse an entry of `objects`: class name, class index, mask, parts, in this order whatever the fields' names."""
    return Person(_mask(entry[2]), tuple((str(part[0].item()), _mask(part[1])) for part in entry[3].ravel()))


def _mask(array: Any) -> np.ndarray:
    """Return a mask after a check of its form."""
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "buif":
        raise ValueError(f"a mask is {describe_array(array)}")
    return array
