"""The checker on folders in MTAN's layout."""

from pathlib import Path

import numpy as np
import pytest
from helpers.mtan_miniature import write_release

from mtcl import UserError
from mtcl.data.verify import Report, find_dataset, format_report, verify


def row(result: Report, check: str) -> tuple[str, str]:
    return next((row.value, row.verdict) for row in result.rows if row.check == check)


@pytest.fixture
def nyuv2(tmp_path: Path) -> Path:
    return write_release(tmp_path / "nyuv2", counts=(4, 3), size=(24, 32))


def test_nyuv2_in_mtans_layout(nyuv2):
    assert find_dataset(nyuv2.parent, None) == ("nyuv2_13", nyuv2)
    result = verify(nyuv2)
    text = format_report(result)
    assert row(result, "list train") == ("4", "deviation")
    assert row(result, "decoded semseg") == ("7", "ok")
    assert row(result, "semseg classes") == ("13 occur", "ok")
    assert row(result, "depth metres")[1] == "ok"
    assert row(result, "image sizes") == ("24x32 (7)", "deviation")
    assert not [one.check for one in result.rows if one.check.startswith(("normals to", "normals of"))]
    assert "the axes of MTAN's release are not documented" in text
    assert [one.check for one in result.damages if not one.check.endswith(("on image", "left and right"))] == []


def test_damage_of_it_is_named(nyuv2):
    (nyuv2 / "val" / "image" / "1.npy").unlink()
    (nyuv2 / "train" / "depth" / "2.npy").unlink()
    np.save(nyuv2 / "train" / "label" / "0.npy", np.full((24, 32), 39))
    damages = {one.check: " ".join(one.details) for one in verify(nyuv2).damages}
    assert "val/image lacks 1.npy, but has 2.npy" in damages["list val"]
    assert "train/depth/2.npy" in damages["files depth"]
    assert "class 39" in damages["decoded semseg"]
    for path in nyuv2.glob("*/image/*.npy"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no images 0\.npy"):
        verify(nyuv2)


def test_cityscapes_in_mtans_layout(tmp_path):
    root = write_release(tmp_path / "cityscapes2", num_classes=7, size=(16, 32), inverse=True)
    assert find_dataset(tmp_path, None) == ("cityscapes_mtl", root)
    result = verify(root)
    assert row(result, "depth inverse")[1] == "ok"
    assert row(result, "semseg classes") == ("7 occur", "ok")
    for path in root.glob("*/depth/*.npy"):
        np.save(path, np.load(path) * 65535)
    (damage,) = (one for one in verify(root).damages if one.check == "depth inverse")
    assert "must be from 0 to 1" in damage.details[0]
