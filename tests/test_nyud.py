"""The NYUD-v2 reader, on archives of a few pixels and, where they are, on the real small frames."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mtcl import UserError
from mtcl.data import NYUD
from mtcl.data.nyud import resized_edges, resized_image
from mtcl.data.transforms import nearest
from mtcl.tasks import NYUD40, build_task

TASKS = ("semseg", "depth", "normals", "edge")
REAL = Path(__file__).parents[1].parent / "shared" / "nyud_mini"


def write(path: Path, array: np.ndarray) -> None:
    """RGB or single-channel arrays as PNG, floating-point ones as .npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def arrays(seed: int, size: tuple[int, int] = (6, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "segmentation": rng.integers(0, 41, size, dtype=np.uint8),
        "depth": rng.uniform(0.5, 9, size).astype(np.float32),
        "normals": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "edge": rng.choice(np.uint8([0, 127, 128, 255]), size),
    }


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Five pictures: three to train on, two to validate."""
    root = tmp_path / "NYUDv2"
    for number in range(1, 6):
        for folder, array in arrays(number).items():
            write(root / folder / f"{number:04d}{'.npy' if folder == 'depth' else '.png'}", array)
    (root / "gt_sets").mkdir()
    (root / "gt_sets" / "train.txt").write_text("0003\n0001\n0002\n")
    (root / "gt_sets" / "val.txt").write_text("0004\n0005\n")
    (root / "gt_sets" / "tune_train.txt").write_text("0001\n0002\n")
    (root / "gt_sets" / "tune_val.txt").write_text("0003\n")
    return root


def message(*args, **kwargs) -> str:
    """The sentence of the error that a reader with these arguments raises when it is made, or read at 0."""
    with pytest.raises(UserError) as error:
        NYUD(*args, **kwargs).read(0)
    return str(error.value)


def test_every_file_round_trips_with_exact_values(archive: Path) -> None:
    reader = NYUD(archive, "train", TASKS)
    assert list(reader.ids) == ["0003", "0001", "0002"]
    for index, number in enumerate((3, 1, 2)):
        stored, sample = arrays(number), reader.read(index)
        assert sample.id == reader.ids[index]
        assert tuple(sample.labels) == TASKS
        np.testing.assert_array_equal(sample.image, stored["images"])
        expected = np.where(stored["segmentation"] == 0, 255, stored["segmentation"].astype(int) - 1)
        np.testing.assert_array_equal(sample.labels["semseg"], expected)
        np.testing.assert_array_equal(sample.labels["depth"], stored["depth"])
        np.testing.assert_array_equal(sample.labels["edge"], stored["edge"] >= 128)
        vectors = stored["normals"] / 127.5 - 1
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        np.testing.assert_allclose(sample.labels["normals"], (length >= 0.5) * vectors / length, atol=1e-6)
        assert (length < 0.5).any() or number != 1  # the case is in the data
        dtypes = {task: label.dtype for task, label in sample.labels.items()}
        assert dtypes == {"semseg": np.uint8, "depth": np.float32, "normals": np.float32, "edge": np.uint8}


def test_depth_without_a_positive_finite_value_is_void(archive: Path) -> None:
    depth = np.float64([[np.nan, np.inf, -np.inf, -1], [0, 1e-3, 2, 80]])
    write(archive / "depth" / "0003.npy", np.tile(depth, (3, 2)))
    label = NYUD(archive, "train", ["depth"]).read(0).labels["depth"]
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label[:2, :4], np.float32([[0, 0, 0, 0], [0, 1e-3, 2, 80]]))


def test_root_may_be_the_folder_or_its_parent(archive: Path) -> None:
    for root in (archive, archive.parent, str(archive)):
        assert NYUD(root, "val", TASKS).ids == ["0004", "0005"]


def test_splits_and_limit(archive: Path) -> None:
    assert NYUD(archive, "train", TASKS, split="tune").ids == ["0001", "0002"]
    assert NYUD(archive, "val", TASKS, split="tune").ids == ["0003"]
    assert NYUD(archive, "train", TASKS, limit=2).ids == ["0003", "0001"]
    assert NYUD(archive, "train", TASKS, limit=9).ids == ["0003", "0001", "0002"]


def test_only_the_list_in_use_is_opened(archive: Path) -> None:
    (archive / "gt_sets" / "val.txt").write_bytes(b"\xff\xfe no such picture")
    (archive / "gt_sets" / "tune_train.txt").unlink()
    assert len(NYUD(archive, "train", TASKS).ids) == 3


def test_only_the_folders_of_the_tasks_in_use_are_needed(archive: Path) -> None:
    for folder in ("segmentation", "normals", "edge"):
        for path in (archive / folder).iterdir():
            path.unlink()
        (archive / folder).rmdir()
    assert list(NYUD(archive, "train", ["depth"]).read(0).labels) == ["depth"]
    assert "segmentation/0003.png" in message(archive, "train", ["depth", "semseg"])


def test_half_unpacked_archive_names_the_first_missing_files(archive: Path) -> None:
    for name in ("normals/0003.png", "normals/0001.png", "edge/0003.png", "edge/0001.png"):
        (archive / name).unlink()
    sentence = message(archive, "train", TASKS)
    assert "lacks 4 files" in sentence
    assert "normals/0003.png, normals/0001.png, edge/0003.png;" in sentence
    assert str(archive) in sentence
    assert "segmentation/<id>.png" in sentence


@pytest.mark.parametrize("state", ["absent", "empty", "no lists"])
def test_root_without_an_archive_tells_the_layout(tmp_path: Path, state: str) -> None:
    root = tmp_path / "data"
    if state != "absent":
        root.mkdir()
    if state == "no lists":
        (root / "images").mkdir()
    sentence = message(root, "train", TASKS)
    assert str(root) in sentence
    assert "depth/<id>.npy" in sentence


def test_unknown_split_names_its_list_and_the_splits_there(archive: Path) -> None:
    (archive / "gt_sets" / "odd_train.txt").write_text("0001\n")
    sentence = message(archive, "val", TASKS, split="tuned")
    assert "tuned_val.txt" in sentence
    assert "['standard', 'tune']" in sentence  # `odd` has no validation list


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"tasks": ["semseg", "sal"]}, ["['sal']", "semseg"]),
        ({"part": "test"}, ["'test'", "'val'"]),
        ({"num_classes": 41}, ["41", "40"]),
        ({"resize": (0, 5)}, ["(0, 5)"]),
        ({"limit": 0}, ["limit=0"]),
    ],
)
def test_impossible_options_are_named(archive: Path, options: dict, parts: list[str]) -> None:
    sentence = message(**({"root": archive, "part": "train", "tasks": TASKS} | options))
    assert all(part in sentence for part in parts)


def test_empty_list_is_an_error(archive: Path) -> None:
    (archive / "gt_sets" / "train.txt").write_text("\n")
    assert "train.txt" in message(archive, "train", TASKS)


def test_class_id_out_of_range_names_file_and_value(archive: Path) -> None:
    ids = np.zeros((6, 8), np.uint8)
    ids[2, 3] = 14
    write(archive / "segmentation" / "0003.png", ids)
    assert NYUD(archive, "train", ["semseg"], num_classes=14).read(0).labels["semseg"][2, 3] == 13
    sentence = message(archive, "train", ["semseg"], num_classes=13)
    assert str(archive / "segmentation" / "0003.png") in sentence
    assert "14" in sentence


@pytest.mark.parametrize("folder", ["segmentation", "depth", "normals", "edge"])
def test_label_of_another_size_names_both(archive: Path, folder: str) -> None:
    name = f"{folder}/0003{'.npy' if folder == 'depth' else '.png'}"
    write(archive / name, arrays(3, (5, 8))[folder])
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert "5x8" in sentence
    assert "6x8" in sentence


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("segmentation/0003.png", np.zeros((6, 8, 3), np.uint8)),
        ("segmentation/0003.png", np.zeros((6, 8), np.uint16)),
        ("normals/0003.png", np.zeros((6, 8), np.uint8)),
        ("edge/0003.png", np.zeros((6, 8, 4), np.uint8)),
        ("depth/0003.npy", np.zeros((6, 8, 1), np.float32)),
        ("depth/0003.npy", np.zeros((6, 8), np.uint16)),
        ("depth/0003.npy", np.full((6, 8), None)),
    ],
)
def test_label_of_another_form_names_it(archive: Path, name: str, array: np.ndarray) -> None:
    write(archive / name, array)
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert str(array.shape) in sentence or "readable" in sentence


@pytest.mark.parametrize("name", ["images/0003.png", "segmentation/0003.png", "edge/0003.png", "depth/0003.npy"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_truncated_file_is_named(archive: Path, name: str, kept: float) -> None:
    data = (archive / name).read_bytes()
    (archive / name).write_bytes(data[: int(len(data) * kept)])
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert "unpack it again" in sentence


def test_offered_builds_the_tasks() -> None:
    offered = NYUD.offered(num_classes=13)
    assert tuple(offered) == TASKS
    assert offered["semseg"] == {"class_names": NYUD40[:13]}
    tasks = {name: build_task(name, **options) for name, options in offered.items()}
    assert tasks["semseg"].channels == 13


def test_fingerprint_tells_lists_and_files_apart_but_not_tasks(archive: Path) -> None:
    known = NYUD(archive, "train", TASKS).fingerprint()
    assert known == NYUD(archive.parent, "train", ["edge"]).fingerprint()
    others = {
        NYUD(archive, "val", TASKS).fingerprint(),
        NYUD(archive, "train", TASKS, limit=2).fingerprint(),
        NYUD(archive, "train", TASKS, resize=(3, 4)).fingerprint(),
    }
    assert len(others | {known}) == 4
    write(archive / "images" / "0003.png", np.zeros((6, 8, 3), np.uint8))
    assert NYUD(archive, "train", TASKS).fingerprint() != known


def test_resize_rules(archive: Path) -> None:
    stored = arrays(3)
    full, half = NYUD(archive, "train", TASKS).read(0), NYUD(archive, "train", TASKS, resize=(3, 4)).read(0)
    blocks = stored["images"].reshape(3, 2, 4, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(half.image - blocks).max() <= 0.5
    for task in ("semseg", "depth", "normals"):
        np.testing.assert_array_equal(half.labels[task], full.labels[task][1::2, 1::2])  # a centre on the border of two
    edges = full.labels["edge"].reshape(3, 2, 4, 2).max(axis=(1, 3))
    np.testing.assert_array_equal(half.labels["edge"], edges)
    assert NYUD(archive, "train", TASKS, resize=(6, 8)).read(0).image.tobytes() == full.image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (16, 12), (20, 30), (33, 12), (16, 25)])
def test_resized_edges_take_the_maximum_of_the_covered_cell(size: tuple[int, int]) -> None:
    edges = (np.random.default_rng(0).random((16, 12)) < 0.1).astype(np.uint8)
    expected = np.zeros(size, np.uint8)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * 16 // size[0], -(-(i + 1) * 16 // size[0]))
            columns = slice(j * 12 // size[1], -(-(j + 1) * 12 // size[1]))
            expected[i, j] = edges[rows, columns].max()
    np.testing.assert_array_equal(resized_edges(edges, size), expected)


def test_a_thin_line_survives_where_nearest_would_lose_it() -> None:
    line = np.zeros((40, 40), np.uint8)
    line[:, 8] = 1
    assert resized_edges(line, (10, 10))[:, 2].all()
    assert not nearest(line, (10, 10)).any()


def test_resized_image_keeps_a_constant() -> None:
    for size in ((3, 4), (12, 16), (3, 16)):
        image = resized_image(np.full((6, 8, 3), 77, np.uint8), size)
        assert image.shape == (*size, 3)
        assert (image == 77).all()


@pytest.fixture(scope="session")
def real_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (REAL / "unpack.py").is_file():
        pytest.skip("the small real frames are not beside this repository")
    folder = tmp_path_factory.mktemp("nyud_mini")
    subprocess.run([sys.executable, REAL / "unpack.py", folder], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_real_frames(real_frames: Path) -> None:
    counts = {
        ("standard", "train"): 795,
        ("standard", "val"): 500,
        ("tune", "train"): 640,
        ("tune", "val"): 155,
    }
    for (split, part), count in counts.items():
        assert len(NYUD(real_frames, part, TASKS, split=split).ids) == count  # type: ignore[arg-type]
    reader = NYUD(real_frames, "train", TASKS)
    for index in range(0, 795, 97):
        sample = reader.read(index)
        assert sample.image.shape == (192, 256, 3)
        assert 10 < sample.image.mean() < 245
        classes, depth, normals = (sample.labels[task] for task in TASKS[:3])
        assert set(np.unique(classes)) <= {*range(39), 255}
        assert depth[depth > 0].min() > 0.3
        assert depth.max() < 10.1
        assert set(np.unique(np.linalg.norm(normals, axis=-1).round(5))) <= {0.0, 1.0}
        assert normals[..., 2].mean() > 0  # towards the viewer
        assert 0 < sample.labels["edge"].mean() < 0.2
        floor = normals[classes == NYUD40.index("floor")]
        assert not len(floor) or floor[:, 1].mean() > 0.5  # up
