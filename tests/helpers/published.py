"""Published results with the Delta_MTL printed there, and sizes of published models."""

import yaml

from helpers.common import ROOT

# Rows of the README of robotyingtang/PRISM-VFM, ViT-B (published_results.md C.1, C.2), and the Delta_MTL printed there.
NYUD = ("semseg", "depth", "normals", "edge")
PASCAL = ("semseg", "human_parts", "sal", "normals", "edge")
SINGLE = {NYUD: (51.15, 0.5792, 19.77, 77.35), PASCAL: (80.25, 70.54, 84.54, 13.57, 74.22)}
PUBLISHED = [
    ("MTL baseline", PASCAL, (76.76, 65.26, 84.39, 13.98, 70.37), -4.04),
    ("InvPT", PASCAL, (77.33, 66.62, 85.14, 13.78, 73.20), -2.28),
    ("SAK", PASCAL, (81.88, 74.30, 84.79, 14.02, 74.09), 0.83),
    ("MTL baseline", NYUD, (49.27, 0.5823, 19.92, 75.88), -1.72),
    ("InvPT", NYUD, (50.30, 0.5367, 19.00, 77.60), 2.47),
    ("TaskPrompter", NYUD, (50.40, 0.5402, 18.91, 77.60), 2.49),
    ("SAK", NYUD, (59.93, 0.4942, 17.60, 78.60), 11.11),
]
HIGHER = {"semseg": True, "human_parts": True, "sal": True, "edge": True, "depth": False, "normals": False}

SIZES = yaml.safe_load((ROOT / "docs" / "published_sizes.yaml").read_text(encoding="utf-8"))


def get_published_parameters(experiment: str) -> int:
    """Return the number of parameters of the published model that an experiment trains."""
    return SIZES[experiment]["parameters"]
