"""From miniatures of NYU Depth v2's official files (few frames of the true size) to the layout of the archive."""

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from helpers.common import ROOT, Result

from mtcl import UserError
from mtcl.cli.prepared import format_prepared
from mtcl.data import NYUD
from mtcl.data.prepare import nyud
from mtcl.data.prepare.jobs import Prepared
from mtcl.data.prepare.normals import KINECT, MIN_SHARE, NOISE, SHARPNESS, Camera, encode_normals, estimate_normals
from mtcl.data.prepare.nyud import FULL_EDITION, WINDOW_4_TO_3, RawFrame, convert_frame, parse_edition, prepare_nyud
from mtcl.data.prepare.regions import SEAM, close_seams, label_regions, region_edges
from mtcl.tasks import NYUD40, build_task

SCRIPT = "scripts/prepare_nyud.py"
REAL = ROOT.parent / "shared" / "nyud_mini"
TASKS = ("semseg", "depth", "normals", "edge")
CAMERA = Camera(130, 131, 79.7, 60.3)  # of the small synthetic frames
SIZE = (120, 160)
CLASSES = (np.arange(894) * 7 % 40 + 1).astype(np.uint8)  # of labels 1 to 894
TRAIN, TEST = (3, 1), (2,)


# Normals


def rays(size: tuple[int, int], camera: Camera) -> np.ndarray:
    """Points at Z = 1 of every pixel, (H, W, 3), x right, y down, z forward."""
    v, u = np.mgrid[: size[0], : size[1]]
    return np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones(size)], axis=-1)


def plane_depth(normal: tuple[float, float, float], distance: float, size=SIZE, camera: Camera = CAMERA) -> np.ndarray:
    """Metres to the plane through (0, 0, ``distance``) with this normal, in the layout's axes: x left, y up, z here."""
    away = np.array(normal)  # the layout's axes point against the camera's, and its normal towards the camera
    return away[2] * distance / (rays(size, camera) @ away)


def angles(estimated: np.ndarray, true: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Degrees between vectors; 180 where one is zero."""
    true = np.asarray(true) / np.linalg.norm(true, axis=-1, keepdims=True)
    length = np.linalg.norm(estimated, axis=-1)
    cosine = (estimated * true).sum(axis=-1) / np.where(length > 0, length, np.inf)
    return np.where(length > 0, np.degrees(np.arccos(np.clip(cosine, -1, 1))), 180)


def decoded(codes: np.ndarray) -> np.ndarray:
    return codes / 127.5 - 1


def as_kinect(depth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Depth with a Kinect's disparity: smooth noise of half a step, and steps of an eighth of a pixel."""
    step = 1 / (8 * 580 * 0.075)  # 1/m: an eighth of a pixel, over focal length and baseline
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=depth.shape), (0, 0), 1.5)
    return 1 / (np.round(1 / depth / step + 0.5 * noise / noise.std()) * step)


PLANES = [(0, 0, 1), (0.8, 0, 1), (-2, 0.5, 1), (0.1, 1, 0.9), (0, -1, 0.8), (1, 1, 1.5)]


@pytest.mark.parametrize("normal", PLANES)
def test_a_plane_has_its_normal_at_every_pixel(normal: tuple[float, float, float]) -> None:
    depth = plane_depth(normal, 2.5)
    measured = depth > 0  # above the horizon there is no floor
    assert measured.mean() > 0.5
    normals = decoded(encode_normals(estimate_normals(depth, CAMERA)))
    surrounded = cv2.erode(measured.astype(np.uint8), np.ones((11, 11))) > 0  # slivers at the horizon may lack a window
    assert angles(normals, normal)[surrounded].max() < 1


def test_axes_are_left_up_and_to_the_viewer() -> None:
    floor = np.where(np.arange(SIZE[0])[:, None] > 80, 1.2 / np.maximum(rays(SIZE, CAMERA)[..., 1], 0.01), 0)
    assert angles(estimate_normals(floor, CAMERA), (0, 1, 0))[85:].max() < 0.1
    x = rays(SIZE, CAMERA)[..., 0]
    right_wall = np.where(x > 0.2, 1.5 / np.maximum(x, 0.2), 0)  # it faces left
    assert angles(estimate_normals(right_wall, CAMERA), (1, 0, 0))[:, 115:].max() < 0.1


def test_the_camera_is_that_of_the_toolbox_counted_from_zero() -> None:
    # The toolbox: x = ((1 ... 640) - cx) / fx * Z, in MATLAB's counting.
    x, y = (np.arange(1, 641) - 325.582449) / 518.857901, (np.arange(1, 481) - 253.736166) / 519.469611
    np.testing.assert_allclose(rays((480, 640), KINECT)[0, :, 0], x)
    np.testing.assert_allclose(rays((480, 640), KINECT)[:, 0, 1], y)
    depth = plane_depth((0.3, 0.2, 1), 3, (480, 640), KINECT)
    assert angles(estimate_normals(depth), (0.3, 0.2, 1)).max() < 0.1


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.5, 0, 1), (0, 1, 0.8)])
def test_noise_and_steps_of_a_kinect_cost_a_few_degrees_at_three_metres(normal: tuple[float, float, float]) -> None:
    depth = as_kinect(plane_depth(normal, 3, (240, 320), Camera(519, 519, 160, 120)))
    camera = Camera(519, 519, 160, 120)
    assert angles(estimate_normals(depth, camera), normal).mean() < 3
    # Why the windows are no smaller:
    assert angles(estimate_normals(depth, camera, radii=(4,)), normal).mean() > 4


def two_planes(border: np.ndarray, normals: list[tuple], distances: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Depth and true normals of one plane where ``border`` and another elsewhere."""
    depths = [plane_depth(normal, distance) for normal, distance in zip(normals, distances)]
    true = np.where(border[..., None], *(np.float64(normal) for normal in normals))
    return np.where(border, *depths), true


def test_normals_do_not_smear_across_a_step() -> None:
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    for border in (u < 80, v < 50, u + v < 140, 2 * u - v < 100):
        depth, true = two_planes(border, [(0, 0, 1), (0.4, 0.2, 1)], [1.5, 2.5])
        length = (region_edges(border) > 0).sum()
        wrong = (angles(estimate_normals(depth, CAMERA), true) > 5).sum()
        assert wrong <= 0.3 * length


def test_normals_turn_sharply_at_a_corner() -> None:
    x = rays(SIZE, CAMERA)[..., 0]
    left_normal, right = (1.0, 0, 1.0), (-1.0, 0, 1.0)
    depth, true = two_planes(x > 0, [left_normal, right], [3.0, 3.0])
    assert (angles(estimate_normals(depth, CAMERA), true) > 5).sum() <= 2 * SIZE[0]


def test_a_bar_thinner_than_the_larger_window_keeps_its_normal() -> None:
    bar = np.zeros(SIZE, bool)
    bar[:, 70:80] = True
    depth, true = two_planes(bar, [(0.5, 0, 1), (0, 0, 1)], [1.5, 2.5])
    error = angles(estimate_normals(depth, CAMERA), true)
    assert error[bar].max() < 5
    assert (angles(estimate_normals(depth, CAMERA, radii=(10,)), true)[bar] > 5).mean() > 0.5


def test_without_depth_there_is_no_normal_and_it_is_stored_black() -> None:
    depth = plane_depth((0, 0, 1), 2)
    depth[40:60, 40:60] = 0
    depth[70:75, 70:75] = np.nan
    depth[80, 80:82] = np.inf
    depth[90, 90] = -1
    holes = ~(np.isfinite(depth) & (depth > 0))
    normals = estimate_normals(depth, CAMERA)
    assert normals.dtype == np.float32
    np.testing.assert_array_equal((normals == 0).all(axis=-1), holes)
    assert angles(normals, (0, 0, 1))[~holes].max() < 1e-3
    codes = encode_normals(normals)
    np.testing.assert_array_equal((codes == 0).all(axis=-1), holes)


@pytest.mark.parametrize("shape", ["nothing", "a speck", "one row", "one column"])
def test_too_little_depth_gives_no_normal(shape: str) -> None:
    where = {"nothing": np.s_[:0], "a speck": np.s_[5:7, 5:7], "one row": np.s_[60], "one column": np.s_[:, 60]}[shape]
    depth = np.zeros(SIZE)
    depth[where] = 2
    assert not estimate_normals(depth, CAMERA).any()


def test_encoding_rounds_to_the_nearest_level() -> None:
    vectors = np.float32([[1, 0, 0], [0, -1, 0], [0, 0.6, 0.8], [0, 0, 0]])
    np.testing.assert_array_equal(encode_normals(vectors), [[255, 128, 128], [128, 0, 128], [128, 204, 230], [0, 0, 0]])


def test_normals_are_those_of_a_slow_reference() -> None:
    rng = np.random.default_rng(1)
    depth = rng.uniform(1.5, 1.6, (9, 12))
    depth[:, 6:] += 0.5
    depth[rng.random(depth.shape) < 0.2] = 0
    camera, radii = Camera(20, 22, 5.5, 4.1), (1, 2)
    normals = estimate_normals(depth, camera, radii=radii)
    for v, u in itertools.product(range(9), range(12)):
        np.testing.assert_allclose(normals[v, u], slow_normal(depth, v, u, camera, radii), atol=1e-5)


def slow_normal(depth: np.ndarray, v: int, u: int, camera: Camera, radii: tuple[int, ...]) -> np.ndarray:
    """The weighted mean of least-squares planes, one window after the other."""
    total = np.zeros(3)
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    for radius, row, column in itertools.product(radii, range(depth.shape[0]), range(depth.shape[1])):
        if max(abs(row - v), abs(column - u)) > radius:
            continue
        inside = (abs(rows - row) <= radius) & (abs(columns - column) <= radius) & (depth > 0)
        if inside.sum() < MIN_SHARE * (2 * radius + 1) ** 2:
            continue
        system = np.stack([columns[inside], rows[inside], np.ones(inside.sum())], axis=1)
        plane = np.linalg.lstsq(system, 1 / depth[inside], rcond=None)[0]
        variance = ((system @ plane - 1 / depth[inside]) ** 2).mean() + NOISE**2
        slopes = np.cov(system[:, :2].T, bias=True) * inside.sum()
        total += plane / (variance * np.trace(np.linalg.inv(slopes))) ** SHARPNESS
    normal = np.array([total[0] * camera.fx, total[1] * camera.fy, total @ [camera.cx, camera.cy, 1]])
    length = np.linalg.norm(normal)
    return normal / length if length > 0 and depth[v, u] > 0 else np.zeros(3)


@pytest.mark.slow
def test_normals_of_real_frames_agree_with_others(tmp_path: Path) -> None:
    if not (REAL / "unpack.py").is_file():
        pytest.skip("the small real frames are not beside this repository")
    subprocess.run([sys.executable, REAL / "unpack.py", tmp_path], check=True, capture_output=True)
    root, scale = tmp_path / "NYUDv2", 256 / WINDOW_4_TO_3.width
    cx, cy = KINECT.cx - WINDOW_4_TO_3.column + 0.5, KINECT.cy - WINDOW_4_TO_3.row + 0.5
    camera = Camera(KINECT.fx * scale, KINECT.fy * scale, cx * scale - 0.5, cy * scale - 0.5)
    differences, floors, ceilings = [], [], []
    for path in sorted((root / "depth").iterdir())[::40]:
        # Smaller windows for smaller frames, and the noise of 8 bits of depth.
        normals = estimate_normals(np.load(path), camera, radii=(2, 5), noise=3e-3)
        other, classes = (cv2.imread(str(root / kind / f"{path.stem}.png"), -1) for kind in ("normals", "segmentation"))
        differences.append(angles(normals, decoded(other[..., ::-1])).ravel())
        floors.append(normals[classes == NYUD40.index("floor") + 1])
        ceilings.append(normals[classes == NYUD40.index("ceiling") + 1])
    difference = np.concatenate(differences)
    print(f"mean {difference.mean():.1f}, median {np.median(difference):.1f} degrees")
    assert np.median(difference) < 9  # the others smear across steps, hence a longer tail
    assert difference.mean() < 22
    assert np.concatenate(floors)[:, 1].mean() > 0.85
    assert np.concatenate(ceilings)[:, 1].mean() < -0.8


# Edges


def slow_edges(regions: np.ndarray) -> np.ndarray:
    edges = np.zeros(regions.shape, np.uint8)
    for i, j in itertools.product(*map(range, regions.shape)):
        for k, m in ((i + 1, j), (i, j + 1)):
            if k < regions.shape[0] and m < regions.shape[1] and regions[i, j] != regions[k, m]:
                edges[i, j] = 255
    return edges


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 11)])
def test_edges_lie_where_a_pixel_differs_from_its_right_or_lower_neighbour(size: tuple[int, int]) -> None:
    regions = np.random.default_rng(0).integers(0, 3, size)
    edges = region_edges(regions)
    assert edges.dtype == np.uint8
    np.testing.assert_array_equal(edges, slow_edges(regions))


def test_a_region_is_a_label_and_its_instance() -> None:
    labels = np.uint16([[0, 0, 1, 1, 894, 2]])
    instances = np.uint8([[0, 255, 1, 2, 255, 1]])
    regions = label_regions(labels, instances)[0]
    assert regions[0] == regions[1] == 0  # void has no instances
    assert len(set(regions)) == 5


@pytest.mark.parametrize("width", [1, 2, 2 * SEAM - 1, 2 * SEAM])
def test_a_seam_between_objects_gives_one_line(width: int) -> None:
    regions = np.ones((60, 80), int)
    regions[:, 40:] = 2
    regions[:, 30 : 30 + width] = 0
    regions[:, 30 + width : 40] = 2
    edges = region_edges(close_seams(regions))
    assert (edges.sum(axis=1) == 255).all()
    line = edges[0].argmax()
    assert 30 - 1 <= line <= 30 + width
    assert abs(line - (30 + width / 2 - 0.5)) <= 1  # in the middle of the seam


def test_wider_void_keeps_its_outline() -> None:
    regions = np.ones((60, 80), int)
    regions[:, 40:] = 2
    regions[:, 30 : 30 + 2 * SEAM + 1] = 0
    np.testing.assert_array_equal(close_seams(regions), regions)
    disk = np.hypot(*(np.mgrid[:60, :80] - np.array([30, 40])[:, None, None])) <= 20
    np.testing.assert_array_equal(close_seams(np.where(disk, 0, 1)) == 0, disk)


def test_a_seam_that_runs_into_wide_void_is_closed_up_to_it() -> None:
    regions = np.ones((60, 80), int)
    regions[:, 40:] = 2
    regions[:, 39:41] = 0
    regions[40:] = 0
    closed = close_seams(regions)
    assert (closed[:36] > 0).all()
    assert (closed[42:] == 0).all()


def test_seams_take_the_nearest_region() -> None:
    rng = np.random.default_rng(0)
    regions = np.kron(rng.integers(1, 9, (5, 6)), np.ones((9, 9), int))
    void = rng.random(regions.shape) < 0.3
    closed = close_seams(np.where(void, 0, regions), seam=3)
    assert (closed > 0).all()  # so sparse that no disk of radius 3 fits
    np.testing.assert_array_equal(closed[~void], regions[~void])
    rows, columns = np.nonzero(~void)
    for i, j in zip(*np.nonzero(void)):
        distance = np.hypot(rows - i, columns - j)
        nearest = distance == distance.min()
        assert closed[i, j] in regions[rows[nearest], columns[nearest]]


def test_frames_of_void_only_or_without_void_stay_as_they_are() -> None:
    for value in (0, 3):
        regions = np.full((20, 30), value)
        np.testing.assert_array_equal(close_seams(regions), regions)


# Files


def raw_frame(number: int) -> RawFrame:
    """A frame of the true size: three planes of depth, blocks of labels with a seam of void, a gradient as image."""
    v, u = np.mgrid[:480, :640]
    image = np.stack([u * 255 // 639, v * 255 // 479, np.full_like(u, 40 * number)], axis=-1).astype(np.uint8)
    block = v // 96 * 8 + u // 80
    labels = (1 + (block * 37 + number) % 894).astype(np.uint16)
    labels[:, 316:322] = 0
    labels[200:300, 100:200] = 0
    labels[300:400, 400:500] = 1 + np.flatnonzero(CLASSES == 40)[number]
    depth = np.where(u < 300, 1.5 + number / 10 + u / 2000, 3 - v / 1000).astype(np.float32)
    return RawFrame(image, depth, labels, (block % 3).astype(np.uint8))


def write_labeled(path: Path, frames: list[RawFrame], **changes: np.ndarray | None) -> None:
    """As MATLAB's format 7.3 lies on the disk: columns first, after a block of text."""
    content = {
        "images": np.stack([frame.image.transpose(2, 1, 0) for frame in frames]),
        "depths": np.stack([frame.depth.T for frame in frames]),
        "labels": np.stack([frame.labels.T for frame in frames]),
        "instances": np.stack([frame.instances.T for frame in frames]),
    }
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in (content | changes).items():
            if array is not None:
                file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]), compression="gzip")
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file")


def write_mats(folder: Path, train=TRAIN, test=TEST, classes: np.ndarray = CLASSES) -> None:
    lists = {"trainNdxs": np.float64([train]).T, "testNdxs": np.float64([test]).T}
    scipy.io.savemat(folder / "splits.mat", lists)
    scipy.io.savemat(folder / "classMapping40.mat", {"mapClass": np.float64(classes)[None]})


FRAMES = [raw_frame(number) for number in (1, 2, 3)]


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "nyu_depth_v2_labeled.mat"
    write_labeled(path, FRAMES)
    return path


@pytest.fixture
def official(tmp_path: Path, labeled: Path) -> Path:
    """A folder with miniatures of the three files; the large one is a link."""
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / labeled.name).symlink_to(labeled)
    write_mats(folder)
    return folder


def prepared(official: Path, out: Path, size: str | None = None, workers: int = 0) -> str:
    labeled, splits, classes = (
        official / name for name in ("nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat")
    )
    return format_prepared(prepare_nyud(labeled, splits, classes, out, size, workers))


def message(official: Path, out: Path, size: str | None = None, workers: int = 0) -> str:
    """The one sentence of the error; the lists that would make the result readable must not be there."""
    with pytest.raises(UserError) as error:
        prepared(official, out, size, workers)
    assert not (out / "gt_sets").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def list_arguments(official: Path, out: Path) -> list[str]:
    options = {"labeled": "nyu_depth_v2_labeled", "splits": "splits", "classes": "classMapping40"}
    return [w for key, stem in options.items() for w in (f"--{key}", f"{official / stem}.mat")] + ["--out", str(out)]


def read(folder: Path, number: int) -> dict[str, np.ndarray]:
    """What is stored, without the project's readers."""
    arrays = {"depth": np.load(folder / "depth" / f"{number:04d}.npy")}
    for kind in ("images", "segmentation", "normals", "edge"):
        array = cv2.imread(str(folder / kind / f"{number:04d}.png"), cv2.IMREAD_UNCHANGED)
        arrays[kind] = array[..., ::-1] if array.ndim == 3 else array
    return arrays


def test_the_command_writes_the_valid_part_of_every_frame(
    official: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    out = tmp_path / "NYUDv2"
    result = cli(SCRIPT, *list_arguments(official, out), "--workers", "0")
    assert result.code == 0
    assert "2 training and 1 validation frames (official: 795 and 654) of 560x425 pixels, 40 classes" in result.out
    assert f"python train.py data=nyud data.root={out}\n" in result.out
    for number, raw in enumerate(FRAMES, 1):
        arrays, crop = read(out, number), np.s_[45:470, 40:600]
        np.testing.assert_array_equal(arrays["images"], raw.image[crop])
        np.testing.assert_array_equal(arrays["segmentation"], np.concatenate([[0], CLASSES])[raw.labels][crop])
        np.testing.assert_array_equal(arrays["depth"], raw.depth[crop])
        assert arrays["depth"].dtype == np.float32
        np.testing.assert_array_equal(arrays["normals"], encode_normals(estimate_normals(raw.depth))[crop])
        regions = close_seams(label_regions(raw.labels, raw.instances))[crop]
        np.testing.assert_array_equal(arrays["edge"], region_edges(regions))
        assert set(np.unique(arrays["edge"])) == {0, 255}
    lists = {path.stem: path.read_text() for path in (out / "gt_sets").iterdir()}
    assert lists == {"train": "0001\n0003\n", "val": "0002\n", "tune_train": "0001\n0003\n", "tune_val": ""}


def test_the_reader_reads_the_result(official: Path, tmp_path: Path) -> None:
    prepared(official, tmp_path / "NYUDv2")
    for root, part, numbers in ((tmp_path, "train", (1, 3)), (tmp_path / "NYUDv2", "val", (2,))):
        reader = NYUD(root, part, TASKS)
        assert list(reader.ids) == [f"{number:04d}" for number in numbers]
        for index, number in enumerate(numbers):
            sample = reader.read(index)
            raw = FRAMES[number - 1]
            np.testing.assert_array_equal(sample.image, raw.image[45:470, 40:600])
            expected = np.concatenate([[255], CLASSES - 1])[raw.labels][45:470, 40:600]
            np.testing.assert_array_equal(sample.labels["semseg"], expected)
            np.testing.assert_array_equal(sample.labels["depth"], raw.depth[45:470, 40:600])
            normals = build_task("normals").finalize_label(sample.labels["normals"])
            true = estimate_normals(raw.depth)[45:470, 40:600]
            assert angles(normals, true).max() < 0.5
            assert set(np.unique(sample.labels["edge"])) == {0, 1}


def test_the_small_edition_is_read_with_39_classes(official: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    out = tmp_path / "small"
    result = cli(SCRIPT, *list_arguments(official, out), "--size", "256x192", "--workers", "0")
    assert result.code == 0
    assert result.out.endswith(f"Next: python train.py data=nyud_small data.root={out}\n")
    reader = NYUD(out, "train", TASKS, num_classes=39)
    sample, raw = reader.read(1), FRAMES[2]
    rows, columns = (2 * np.arange(192) + 1) * 420 // 384 + 47, (2 * np.arange(256) + 1) * 560 // 512 + 41
    nearest = np.ix_(rows, columns)
    merged = np.where(CLASSES == 40, 255, CLASSES - 1)
    np.testing.assert_array_equal(sample.labels["semseg"], np.concatenate([[255], merged])[raw.labels][nearest])
    assert (CLASSES[raw.labels[nearest].astype(int) - 1] == 40).any()  # the case is in the data
    np.testing.assert_array_equal(sample.labels["depth"], raw.depth[nearest])
    np.testing.assert_array_equal(sample.labels["normals"], encode_normals(estimate_normals(raw.depth))[nearest])
    regions = close_seams(label_regions(raw.labels, raw.instances))[nearest]
    np.testing.assert_array_equal(sample.labels["edge"] * 255, slow_edges(regions))
    assert sample.image.shape == (192, 256, 3)
    # The mean of the pixels that are covered: of a ramp, its value in the middle.
    middle = 41 + (np.arange(256) + 0.5) * 560 / 256 - 0.5
    assert np.abs(sample.image[..., 0] - middle * 255 / 639).max() < 1.2


def test_otherprop_and_void_keep_their_edges_in_the_small_edition() -> None:
    labels = np.ones((480, 640), np.uint16)
    labels[:, 300:] = 2
    frame = RawFrame(
        np.zeros((480, 640, 3), np.uint8), np.ones((480, 640), np.float32), labels, labels.astype(np.uint8)
    )
    arrays = convert_frame(frame, np.array([0, 40, 40]), parse_edition("64x48"))
    assert not arrays["segmentation"].any()
    assert (arrays["edge"].sum(axis=1) == 255).all()


@pytest.mark.parametrize("size", ["560x420", "320x240", "100x75", "101x75", "4x3"])
def test_sizes_of_four_to_three(size: str) -> None:
    width, height = map(int, size.split("x"))
    edition = parse_edition(size)
    assert edition.size == (height, width)
    assert edition.window == (47, 41, 420, 560)
    assert {array.shape[:2] for array in convert_frame(FRAMES[0], np.zeros(895, int), edition).values()} == {
        (height, width)
    }


@pytest.mark.parametrize("size", ["256", "256x", "x", "256x192x3", "-4x-3", "0x0", "256x256", "192x256", "640x480"])
def test_other_sizes_are_refused(official: Path, tmp_path: Path, size: str) -> None:
    sentence = message(official, tmp_path / "out", size)
    assert f"--size {size} is not" in sentence
    assert "256x192" in sentence
    assert not (tmp_path / "out").exists()


def test_another_small_size_needs_the_training_size_too(official: Path, tmp_path: Path) -> None:
    assert "data=nyud_small" in (summary := prepared(official, tmp_path / "an out", "64x48"))
    assert summary.endswith(f"'data.root={tmp_path / 'an out'}' 'data.size=[48,64]'")


@pytest.mark.slow
def test_another_process_writes_the_same_files_as_this_one(official: Path, tmp_path: Path) -> None:
    for out, workers in (("one", 0), ("two", 1)):
        prepared(official, tmp_path / out, "64x48", workers)
    one, two = (
        {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
        for out in ("one", "two")
    )
    assert len(one) == 3 * 5 + 4 + 1
    assert one == two


def test_a_second_run_goes_on_where_the_first_was_stopped(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, converted = tmp_path / "out", []
    real = nyud.convert_frame
    monkeypatch.setattr(nyud, "convert_frame", lambda frame, *args: converted.append(frame) or real(frame, *args))
    prepared(official, out, "64x48")
    assert len(converted) == 3
    (out / "edge" / "0002.png").unlink()
    (out / "gt_sets" / "val.txt").unlink()
    time_before = (out / "edge" / "0001.png").stat().st_mtime_ns
    prepared(official, out, "64x48")
    assert len(converted) == 4
    np.testing.assert_array_equal(converted[3].image, FRAMES[1].image)
    assert (out / "edge" / "0001.png").stat().st_mtime_ns == time_before
    assert len(NYUD(out, "val", TASKS).ids) == 1


def test_a_folder_begun_with_another_size_or_file_is_refused(official: Path, tmp_path: Path) -> None:
    prepared(official, out := tmp_path / "out", "64x48")
    with pytest.raises(UserError, match="started with another size;"):
        prepared(official, out, "256x192")
    write_mats(official, classes=CLASSES[:800])
    with pytest.raises(UserError, match="started with another classes;"):
        prepared(official, out, "64x48")


def test_a_full_disk_ends_in_one_sentence(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out", os.replace

    def replace(source, target) -> None:
        if str(target).endswith("normals/0002.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    sentence = message(official, out, "64x48")
    assert f"{out} can't be written (No space left on device)" in sentence
    assert "repeat the command, which continues where it stopped" in sentence
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    assert "2 training" in prepared(official, out, "64x48")


# Mistakes


@pytest.mark.parametrize("name", ["nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"])
@pytest.mark.parametrize("state", ["absent", "text", "truncated"])
def test_files_that_are_not_there_or_damaged_are_named(official: Path, tmp_path: Path, name: str, state: str) -> None:
    path = official / name
    content = path.read_bytes()
    path.unlink()
    if state != "absent":
        path.write_bytes(b"<html>Sign in</html>" if state == "text" else content[: len(content) * 2 // 3])
    assert str(path) in message(official, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_frame_is_named(official: Path, tmp_path: Path, labeled: Path) -> None:
    path = official / labeled.name
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        where = file["depths"].id.get_chunk_info(1).byte_offset + 512 + 100
    content[where : where + 200] = bytes(200)
    path.unlink()
    path.write_bytes(content)
    sentence = message(official, tmp_path / "out", "64x48")
    assert f"{path} is damaged at frame 2" in sentence


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"instances": None}, "no variable instances"),
        ({"depths": np.zeros((2, 640, 480), np.float32)}, "depths in"),
        ({"labels": np.zeros((1, 640, 480), np.float64)}, "labels in"),
        ({"images": np.zeros((1, 3, 480, 640), np.uint8)}, "images in"),
    ],
)
def test_a_labelled_file_of_another_form_is_refused(
    official: Path, tmp_path: Path, changes: dict[str, np.ndarray | None], part: str
) -> None:
    path = official / "nyu_depth_v2_labeled.mat"
    path.unlink()
    write_labeled(path, FRAMES[:1], **changes)
    sentence = message(official, tmp_path / "out")
    assert part in sentence
    assert str(path) in sentence


@pytest.mark.parametrize(
    ("train", "test", "part"),
    [
        ((1, 2), (2,), "listed twice"),
        ((1, 2), (), "a list is empty"),
        ((0, 1), (2,), "lists frames 0 to 2"),
        ((1, 2), (4,), "lists frames 1 to 4, but the labelled file has 1 to 3"),
        ((1, 2.5), (3,), "trainNdxs"),
    ],
)
def test_splits_that_do_not_fit_are_refused(official: Path, tmp_path: Path, train, test, part: str) -> None:
    write_mats(official, train, test)
    sentence = message(official, tmp_path / "out")
    assert part in sentence
    assert str(official / "splits.mat") in sentence


@pytest.mark.parametrize("value", [0, 41, 1.5])
def test_a_mapping_to_other_classes_is_refused(official: Path, tmp_path: Path, value: float) -> None:
    write_mats(official, classes=np.append(CLASSES[:-1], value))
    sentence = message(official, tmp_path / "out")
    assert "mapClass" in sentence
    assert str(official / "classMapping40.mat") in sentence


def test_a_label_beyond_the_mapping_names_its_frame(official: Path, tmp_path: Path) -> None:
    largest = int(FRAMES[0].labels.max())
    write_mats(official, classes=CLASSES[: largest - 1])
    sentence = message(official, tmp_path / "out", "64x48")
    assert f"Frame 1 of {official / 'nyu_depth_v2_labeled.mat'} has the label {largest}" in sentence
    assert f"1 to {largest - 1}" in sentence


def test_the_command_prints_mistakes_in_one_line(official: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    for extra in (["--size", "1x9"], ["--workers", "-1"]):
        result = cli(SCRIPT, *list_arguments(official, tmp_path / "out"), *extra)
        assert result.code == 1
        assert result.out == ""
        assert result.err.startswith("error: ")
        assert extra[0] in result.err
        assert extra[1] in result.err
        assert result.err.count("\n") == 1


def test_the_command_uses_every_core_by_itself(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, official: Path, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(nyud, "prepare_nyud", lambda **options: asked.append(options) or Prepared("done", "nyud", {}))
    assert cli(SCRIPT, *list_arguments(official, tmp_path / "out")).out == "done\nNext: python train.py data=nyud\n"
    names = {"labeled": "nyu_depth_v2_labeled.mat", "splits": "splits.mat", "classes": "classMapping40.mat"}
    paths = {key: official / name for key, name in names.items()}
    assert asked == [{**paths, "out": tmp_path / "out", "size": None, "workers": os.cpu_count()}]


def test_the_crop_is_the_valid_part_in_matlabs_counting() -> None:
    frame = np.arange(480)[:, None] * 1000 + np.arange(640)
    np.testing.assert_array_equal(FULL_EDITION.window.crop(frame), frame[46 - 1 : 470, 41 - 1 : 600])
    assert FULL_EDITION.size == (425, 560)
