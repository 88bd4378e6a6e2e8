"""The published toolchains by name, from a saved map and its label to counts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtcl.errors import UserError
from mtcl.metrics.boundaries.scoring import boundary_counts, linspace_thresholds
from mtcl.metrics.boundaries.suppression import INVPT, SAK, SuppressionConfig, nms
from mtcl.metrics.boundaries.thinning import thin_masks

MAX_DISTANCE = {"nyud": 0.011, "pascal": 0.0075}  # of the image's diagonal (BDET/seism/src/scripts/eval_method.m)
NMS: dict[str, SuppressionConfig | None] = {"none": None, "sak": SAK, "invpt": INVPT}


@dataclass(frozen=True)
class Preset:
    """How a map and its label are compared; the images of a set are the caller's choice.

    Attributes:
        suppression: non-maximum suppression of the map; None: none.
        rounded: the suppressed map passes through an 8-bit file.
        thresholds: at which the map is binarised.
        strict: binarise at > instead of >=.
        seg2bmap: take the label for a segmentation; of a line this makes a band of two pixels.
        thin_truth: thin the true boundary.
        interpolate: compute odsF also between the thresholds.
    """

    suppression: SuppressionConfig | None = None
    rounded: bool = False
    thresholds: tuple[float, ...] = tuple(linspace_thresholds(99))
    strict: bool = False
    seg2bmap: bool = False
    thin_truth: bool = True
    interpolate: bool = False

    def prepare_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Suppress a map uint8 (H, W) for binarisation: float32 in 0..1 or uint8."""
        if self.suppression is None:
            return prediction
        edges = nms(prediction.astype(np.float32) / np.float32(255), *self.suppression)
        return np.floor(edges * 255 + 0.5).astype(np.uint8) if self.rounded else edges

    def boundary_of_label(self, label: np.ndarray) -> np.ndarray:
        """Return the true boundary of a label (integers (H, W), 0 = none): bool (H, W)."""
        boundary = seg2bmap(label) if self.seg2bmap else label != 0
        return thin_masks(boundary[None])[0] if self.thin_truth else boundary

    def counts(
        self,
        prediction: np.ndarray,
        labels: Sequence[np.ndarray],
        max_distance: float,
        valid: np.ndarray | None = None,
    ) -> np.ndarray:
        """Count the matches of one image at every threshold.

        Args:
            prediction: map uint8 (H, W).
            labels: of each annotator, integers (H, W).
            max_distance: a fraction of the diagonal.
            valid: bool (H, W); where false, there is neither truth nor prediction: the suppressed map is 0 there.

        Returns:
            int64 (K, 4), see :func:`boundary_counts`.
        """
        edges, truths = self.prepare_prediction(prediction), [self.boundary_of_label(label) for label in labels]
        if valid is not None:
            edges, truths = edges * valid, [truth & valid for truth in truths]
        return boundary_counts(edges, truths, np.array(self.thresholds), max_distance, self.strict)


PRESETS: dict[str, Preset] = {
    # predictions in 8 bits, SAK's suppression, the edge label itself
    "default": Preset(suppression=SAK, rounded=True),
    # innovator-zero/seism; PASCAL: 5,105 images of `val`, NYUD: 654
    "sak": Preset(suppression=SAK, rounded=True, seg2bmap=True),
    # prismformore/Boundary-Detection-Evaluation-Tools (BDET); PASCAL: 2,498 images of `test_new`, NYUD: 654
    "invpt": Preset(
        suppression=INVPT,
        thresholds=(0.001, *(k / 100 for k in range(1, 100)), 0.999),
        strict=True,
        seg2bmap=True,
    ),
    # the official benchmark of BSDS500
    "bsds": Preset(thin_truth=False, interpolate=True),
}


def get_preset(name: str, thresholds: int | None = None) -> Preset:
    """Return a preset.

    Args:
        name: one of :data:`PRESETS`.
        thresholds: number of even thresholds; None: those of the preset.

    Raises:
        UserError: the name is unknown, or there are no thresholds.
    """
    if name not in PRESETS:
        raise UserError(f"No edge preset {name!r}: choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    return preset if thresholds is None else replace(preset, thresholds=tuple(linspace_thresholds(thresholds)))


def seg2bmap(segments: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from their right, lower or lower right neighbour: bool (H, W).

    Source: innovator-zero/seism/src/misc/seg2bmap.m.
    """
    boundary = np.zeros(segments.shape, bool)
    boundary[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    boundary[:-1] |= segments[:-1] != segments[1:]
    boundary[:-1, :-1] |= segments[:-1, :-1] != segments[1:, 1:]
    return boundary
