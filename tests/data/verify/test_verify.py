"""The checker of dataset folders: a sound miniature passes, and every damage is found."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from helpers.common import ROOT, Result
from helpers.pascal_miniature import (
    CONTEXT_PERSON,
    PERSON,
    Object,
    write_archive,
    write_context,
    write_list,
    write_parts,
)

from mtcl import UserError
from mtcl.data import NYUD, Rooms
from mtcl.data.datasets.pascal_context import PascalContext
from mtcl.data.datasets.rooms import CLASS_NAMES
from mtcl.data.verify import FACTS, Report, align, find_dataset, format_report, judge, verify
from mtcl.data.verify.facts import NYUD_SHARES
from mtcl.data.verify.table import Row, format_table
from mtcl.tasks import NYUD40, VOC21

REAL = ROOT.parent / "shared" / "nyud_mini"
SIZE = (96, 128)
NYUD_TASKS = ("semseg", "depth", "normals", "edge")
LABELS = ("segmentation", "depth", "normals", "edge")
SCRIPT = "scripts/verify_data.py"
# Rooms' classes as ids of NYUD-v2's files and as VOC's
TO_NYUD = np.uint8([NYUD40.index(name) + 1 if name in NYUD40 else 40 for name in CLASS_NAMES])
TO_VOC = np.uint8([VOC21.index(name) if name in VOC21 else 0 for name in CLASS_NAMES])


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def codes(normals: np.ndarray) -> np.ndarray:
    return np.rint((normals + 1) * 127.5).astype(np.uint8)


def ids(count: int, first: int) -> list[str]:
    return [f"{number:04d}" for number in range(first, first + count)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and six validation rooms in NYUD-v2's layout."""
    root = tmp_path_factory.mktemp("sound") / "NYUDv2"
    for part, names in (("train", ids(10, 1)), ("val", ids(6, 101))):
        rooms = Rooms(part, NYUD_TASKS, size=SIZE)
        for index, name in enumerate(names):
            sample = rooms.read(index)
            write(root / "images" / f"{name}.png", sample.image)
            write(root / "segmentation" / f"{name}.png", TO_NYUD[sample.labels["semseg"]])
            write(root / "depth" / f"{name}.npy", sample.labels["depth"])
            write(root / "normals" / f"{name}.png", codes(sample.labels["normals"]))
            write(root / "edge" / f"{name}.png", sample.labels["edge"] * np.uint8(255))
        write_list(root / "gt_sets" / f"{part}.txt", names)
    write_list(root / "gt_sets" / "tune_train.txt", ids(8, 1))
    write_list(root / "gt_sets" / "tune_val.txt", ids(2, 9))
    return root


@pytest.fixture
def archive(sound: Path, tmp_path: Path) -> Path:
    """The sound miniature, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "data" / "NYUDv2"))


def change(folder: Path, work: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace every array of a folder by ``work`` of it; colours are RGB."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npy":
            np.save(path, work(np.load(path)))
        else:
            array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            write(path, work(array[..., ::-1] if array.ndim == 3 else array))


def damages(result: Report) -> dict[str, str]:
    """check -> its sentences, of what is damaged."""
    return {row.check: " ".join(row.details) for row in result.damages}


def row(result: Report, check: str) -> Row:
    return next(row for row in result.rows if row.check == check)


def test_a_sound_miniature_has_no_damage_and_is_left_as_it_was(sound: Path) -> None:
    times_before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    result = verify(sound)
    assert damages(result) == {}
    assert result.name == "nyud"
    assert tuple(result.tasks) == NYUD_TASKS
    for check in ("lists train and val", "list tune_val", "decoded depth", "label sizes", "depth metres"):
        assert row(result, check).verdict == "ok", check
    for task in NYUD_TASKS:
        assert row(result, f"{task} on image").verdict == "ok", row(result, f"{task} on image")
        assert row(result, f"{task} left and right").verdict == "ok"
    assert row(result, "normals of floors").verdict == "ok"
    assert row(result, "list train").verdict == "deviation"  # ten images
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == times_before


def test_the_script_prints_the_table_and_draws_the_sheet(
    sound: Path, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(str(ROOT / SCRIPT), str(sound.parent))
    assert result.code == 0, result.err
    assert "error" not in result.err
    assert all(len(line) <= 120 for line in result.out.splitlines() if "|" in line)
    assert "deviation: list train: 10 images, the official list has 795" in result.out
    sheet = cv2.imread(str(tmp_path / "verify_nyud.png"))
    assert sheet.shape[1] > 5 * 240
    assert sheet.shape[0] > 6 * 180


def test_the_script_exits_with_one_sentence_about_damage(
    archive: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    (archive / "edge" / "0002.png").unlink()
    write_list(archive / "gt_sets" / "tune_val.txt", ["0101"])
    result = cli(str(ROOT / SCRIPT), str(archive), "--workers", "0", "--sheet", str(tmp_path / "sheet.png"))
    assert result.code == 1
    assert f"error: 2 problems in {archive}, the first: " in result.err
    assert "0101" in result.err.splitlines()[-1]
    assert "edge/0002.png" in result.out
    assert (tmp_path / "sheet.png").is_file()  # drawn all the same


def test_results_are_told_where_no_sheet_can_be_written(
    sound: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    (tmp_path / "file").write_text("")
    result = cli(str(ROOT / SCRIPT), str(sound), "--workers", "0", "--sheet", str(tmp_path / "file" / "sheet.png"))
    assert result.code == 0, result.err
    assert "0 damages" in result.out
    assert re.search(r"no contact sheet: .*sheet\.png can't be written", result.out)


def test_the_sheet_never_lies_in_the_dataset(sound: Path, cli: Callable[..., Result]) -> None:
    result = cli(str(ROOT / SCRIPT), str(sound), "--sheet", str(sound / "sheet.png"))
    assert result.code == 1
    assert "sheet.png lies in the dataset" in result.err


def test_frequencies_are_printed_alone(sound: Path, cli: Callable[..., Result]) -> None:
    result = cli(str(ROOT / SCRIPT), str(sound), "--frequencies", "--workers", "0")
    shares = [float(word) for word in result.out.split(",")]
    counts = np.zeros(256)
    for path in sorted((sound / "segmentation").iterdir())[:10]:
        counts += np.bincount(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ravel(), minlength=256)
    np.testing.assert_allclose(shares, counts[1:41] / counts[1:41].sum(), atol=1e-5)


@pytest.mark.parametrize(("folder", "kind"), [("images", "image"), ("segmentation", "semseg"), ("depth", "depth")])
def test_a_truncated_file_is_named(archive: Path, folder: str, kind: str) -> None:
    (path,) = (archive / folder).glob("0003.*")
    path.write_bytes(path.read_bytes()[:-200])
    assert damages(verify(archive))[f"decoded {kind}"].startswith(str(path))


def test_a_missing_file_is_named(archive: Path) -> None:
    for name in ("0004", "0001", "0102", "0103"):
        (archive / "normals" / f"{name}.png").unlink()
    (sentence,) = damages(verify(archive)).values()
    assert "lacks 4 files of normals" in sentence
    assert "normals/0001.png, normals/0004.png, normals/0102.png" in sentence


def test_a_task_without_its_folder_is_only_a_deviation(archive: Path) -> None:
    shutil.rmtree(archive / "edge")
    result = verify(archive)
    assert damages(result) == {}
    assert row(result, "files edge").verdict == "deviation"
    assert "not there" in row(result, "files edge").value
    assert "edge" not in result.tasks


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_nothing_to_measure_is_an_error(archive: Path, folder: str) -> None:
    for each in ["images"] if folder == "images" else LABELS:
        shutil.rmtree(archive / each)
    with pytest.raises(UserError, match="holds no image" if folder == "images" else "holds no label of any task"):
        verify(archive)


def test_an_id_twice_is_named_and_the_pictures_are_measured_all_the_same(archive: Path) -> None:
    write_list(archive / "gt_sets" / "train.txt", [*ids(10, 1), "0007"])
    result = verify(archive)
    assert "0007" in damages(result).pop("list train")
    assert len(damages(result)) == 1
    assert row(result, "decoded depth").value == "16"


def test_a_list_that_is_missing_or_empty_is_damage(archive: Path) -> None:
    (archive / "gt_sets" / "val.txt").unlink()
    (archive / "gt_sets" / "tune_val.txt").write_bytes(b"\xff\xfe")
    result = verify(archive)
    assert set(damages(result)) == {"list val", "list tune_val"}
    (archive / "gt_sets" / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="gt_sets"):
        verify(archive)


def test_a_path_in_place_of_an_id_is_damage_and_never_followed(archive: Path) -> None:
    write_list(archive / "gt_sets" / "train.txt", ["0001", "../../x"])
    report = verify(archive)
    (row,) = [row for row in report.damages if row.check == "list train"]
    assert "lists '../../x', which is not a valid id" in row.details[0]


def test_training_pictures_in_the_validation_list_are_named(archive: Path) -> None:
    write_list(archive / "gt_sets" / "val.txt", [*ids(6, 101), "0004", "0005"])
    assert "0004, 0005" in damages(verify(archive))["lists train and val"]


def test_a_tuning_list_with_test_pictures_is_named(archive: Path) -> None:
    write_list(archive / "gt_sets" / "tune_val.txt", ["0009", "0103"])
    assert "0103" in damages(verify(archive))["list tune_val"]


@pytest.mark.parametrize(("down", "right"), [(0, 5), (-4, 0)])
def test_shifted_labels_are_found(archive: Path, down: int, right: int) -> None:
    for folder in LABELS:
        change(archive / folder, lambda array: np.roll(array, (down, right), axis=(0, 1)))
    damage = damages(verify(archive))
    for task in NYUD_TASKS:
        offsets = re.findall(
            r"of (?:train|val) lies ([+-]\d+) pixels down and ([+-]\d+) right", damage[f"{task} on image"]
        )
        assert len(offsets) == 2
        assert all(abs(int(a) - down) <= 1 and abs(int(b) - right) <= 1 for a, b in offsets), (task, offsets)


def test_mirrored_labels_are_found(archive: Path) -> None:
    for folder in LABELS:
        change(archive / folder, lambda array: array[:, ::-1])
    damage = damages(verify(archive))
    for task in NYUD_TASKS:
        for part in ("train", "val"):
            assert f"{task} of {part} is mirrored" in damage[f"{task} left and right"]


def test_labels_of_one_list_alone_are_found(archive: Path) -> None:
    for path in (archive / "segmentation").glob("01*.png"):
        write(path, np.roll(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 6, axis=1))
    sentence = damages(verify(archive))["semseg on image"]
    assert "of val" in sentence
    assert "of train" not in sentence


def test_labels_of_other_pictures_are_no_clear_answer(archive: Path) -> None:
    paths = sorted((archive / "segmentation").iterdir())
    content = [path.read_bytes() for path in paths]
    for path, other in zip(paths, content[1:] + content[:1]):
        path.write_bytes(other)
    assert row(verify(archive), "semseg on image").verdict == "deviation"  # few images; of many it is damage


@pytest.mark.parametrize("step", [1, -1])
def test_classes_off_by_one_are_found(archive: Path, step: int) -> None:
    def moved(array: np.ndarray) -> np.ndarray:
        return np.clip(array.astype(int) + step, 0, 40).astype(np.uint8)

    change(archive / "segmentation", moved)
    damage = damages(verify(archive))
    assert damage
    assert set(damage) <= {"semseg frequencies", "normals of floors"}
    if step > 0:
        assert "one too large" in damage["semseg frequencies"]


@pytest.mark.parametrize("factor", [1000, 0.01])
def test_depth_in_other_units_is_found(archive: Path, factor: float) -> None:
    change(archive / "depth", lambda array: array * np.float32(factor))
    assert set(damages(verify(archive))) == {"depth metres"}


def test_depth_of_eight_bits_is_a_deviation(archive: Path) -> None:
    change(archive / "depth", lambda array: np.round(array * 25) / np.float32(25))
    result = verify(archive)
    assert damages(result) == {}
    assert "8-bit" in row(result, "depth levels").details[0]


@pytest.mark.parametrize(
    ("axes", "check"),
    [
        ((0, 1, -2), "normals to the viewer"),
        ((0, -1, 2), "normals of floors"),
        ((-0.0, 1, 2), "normals of side walls"),
        ((0, 2, 1), "normals of floors"),
        ((2, 1, 0), "normals to the viewer"),
    ],
)
def test_normals_with_other_axes_are_found(archive: Path, axes: tuple[float, ...], check: str) -> None:
    def turned(array: np.ndarray) -> np.ndarray:
        return np.stack([255 - array[..., -int(a)] if str(a)[0] == "-" else array[..., int(a)] for a in axes], axis=-1)

    change(archive / "normals", turned)
    assert check in damages(verify(archive))


def test_few_pictures_are_too_few_to_tell_the_axes_of_normals(archive: Path) -> None:
    change(archive / "normals", lambda array: np.stack([255 - array[..., i] for i in range(3)], axis=-1))
    checks = ("normals to the viewer", "normals of floors", "normals of side walls")
    few = verify(archive, limit=2)
    for check in checks:
        assert row(few, check).verdict == "deviation"
        assert "too few to tell" in row(few, check).details[0]
    assert set(checks) <= set(damages(verify(archive)))
    assert judge._axis_row("", "", "", False, False, 16, "").verdict == "deviation"  # no other axis fits better


def test_labels_of_another_size_are_a_deviation_and_of_another_shape_damage(archive: Path) -> None:
    change(archive / "edge", lambda array: cv2.resize(array, (256, 192), interpolation=cv2.INTER_NEAREST))
    result = verify(archive)
    assert damages(result) == {}
    assert row(result, "label sizes").value == "edge 16 differ"
    change(archive / "edge", lambda array: array[:, :128])
    assert "192x128" in damages(verify(archive))["decoded edge"]


def test_a_limit_measures_the_first_pictures_but_checks_whole_lists(archive: Path) -> None:
    (archive / "edge" / "0009.png").write_bytes(b"")
    result = verify(archive, limit=7)
    assert damages(result) == {}
    assert row(result, "decoded edge").value == "13"
    assert row(result, "list train").value == "10"
    assert "only the first 7 images of each list" in format_report(result)
    for options, key in (({"limit": 0}, "limit=0"), ({"workers": -1}, "workers=-1")):
        with pytest.raises(UserError, match=key):
            verify(archive, **options)


def test_the_dataset_is_seen_from_what_is_there(sound: Path, tmp_path: Path) -> None:
    assert find_dataset(sound.parent, None) == ("nyud", sound)
    assert find_dataset(sound, "nyud_small") == ("nyud_small", sound)
    with pytest.raises(UserError, match="ImageSets/Context"):
        find_dataset(sound, "pascal")
    with pytest.raises(UserError, match="not a folder"):
        find_dataset(tmp_path / "none", None)
    small = tmp_path / "small"
    write_list(small / "gt_sets" / "val.txt", ids(500, 0))
    assert find_dataset(small, None)[0] == "nyud_small"
    (small / "prepared.json").write_text("{}")  # written by scripts/prepare_nyud.py
    assert find_dataset(small, None)[0] == "nyud"


def test_a_prepared_folder_tells_its_size(archive: Path) -> None:
    (archive / "prepared.json").write_text('{"made": "NYUDv2", "size": "128x96"}')
    text = format_report(verify(archive))
    assert "known deviation: written by one of mtcl's prepare scripts (prepared.json: size 128x96)" in text


def test_known_shares_are_of_all_but_the_last_class() -> None:
    assert len(NYUD_SHARES) == 39
    assert sum(NYUD_SHARES) == pytest.approx(1, abs=1e-4)
    assert set(FACTS) == {"nyud", "nyud_small", "pascal", "nyuv2_13", "cityscapes_mtl"}


def test_tables_have_aligned_columns_and_wrap() -> None:
    text = format_table([Row("a check", "word " * 30, "short"), Row("b", "", "", "damage")])
    lines = text.splitlines()
    assert len({line.index("|") for line in lines if "|" in line}) == 1
    assert max(map(len, lines)) <= 120
    assert sum("word" in line for line in lines) == 4


def slow_surface(image: np.ndarray, marks: np.ndarray, extent: int) -> np.ndarray:
    """Correlations by definition: what is outside counts nothing."""
    height, width = image.shape
    padded = np.pad(marks, extent)
    shifts = range(2 * extent + 1)
    return np.array([[(image * padded[y : y + height, x : x + width]).sum() for x in shifts] for y in shifts])


def test_the_surface_is_the_correlation_at_each_shift() -> None:
    rng = np.random.default_rng(0)
    image, marks = (rng.normal(size=(23, 30)).astype(np.float32) for _ in range(2))
    expected = slow_surface(image, marks, align.REACH + align.WINDOW)
    np.testing.assert_allclose(align._surface(image, marks), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "shift", "clear", "sided", "verdict"),
    [
        (100, (1, -2), True, 20, "ok"),
        (100, (0, 3), True, 20, "damage"),
        (49, (5, 5), False, 0, "deviation"),  # few images say little
        (50, (5, 5), False, 0, "damage"),  # many must say something
        (100, (5, 5), False, 9, "deviation"),  # but smooth labels may only be known from their mirror images
    ],
)
def test_what_pictures_say_together_is_judged(
    count: int, shift: tuple[int, int], clear: bool, sided: float, verdict: str
) -> None:
    fit = align.Fit(count=count, shift=shift, clear=clear, correlation=0.2, mirrored=0.1, sided=sided)
    assert judge._shift_verdict(fit) == verdict


def test_boundaries_lie_on_both_sides_of_a_change_of_any_kind() -> None:
    expected = np.zeros((5, 8), np.float32)
    expected[:, 3:5] = 1
    classes = np.zeros((5, 8), np.uint8)
    classes[:, 4:] = 255
    np.testing.assert_array_equal(align.boundaries(classes), expected)
    depth = np.ones((5, 8), np.float32)
    depth[:, 4:] = 1.1
    np.testing.assert_allclose(align.boundaries(depth), expected * np.log(1.1), rtol=1e-5)
    depth[:, 4:] = 0  # void is no jump
    assert not align.boundaries(depth).any()
    normals = np.zeros((5, 8, 3), np.float32)
    normals[:, :4, 2] = normals[:, 4:, 0] = 1
    np.testing.assert_array_equal(align.boundaries(normals), expected)


def test_a_ring_is_centred_as_a_peak_is() -> None:
    extent = align.REACH + align.WINDOW
    rows, columns = np.mgrid[-extent : extent + 1, -extent : extent + 1]
    away = np.hypot(rows - 2, columns + 3)
    assert align._centre(np.exp(-(away**2) / 4)) == (2, -3)
    assert align._centre(np.exp(-((away - 5) ** 2) / 4)) == (2, -3)


def pascal_room(root: Path, name: str, sample_index: int, part: str) -> None:
    """A room as PASCAL-Context: its persons' parts, VOC's classes, a context class for each of its classes."""
    sample = Rooms(part, ("semseg", "human_parts", "sal", "normals"), size=SIZE).read(sample_index)
    labels = sample.labels
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
    assert cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), sample.image[..., ::-1], quality)
    write(root / "semseg" / "pascal-context" / f"{name}.png", TO_VOC[labels["semseg"]])
    context = np.uint16([CONTEXT_PERSON if c == "person" else 440 - i for i, c in enumerate(CLASS_NAMES)])
    write_context(root / "pascal-context" / "trainval" / f"{name}.mat", context[labels["semseg"]])
    part_names = ("head", "torso", "luarm", "llarm", "luleg", "llleg")
    parts = tuple((part, (labels["human_parts"] == i + 1).astype(np.uint8)) for i, part in enumerate(part_names))
    person = (labels["semseg"] == CLASS_NAMES.index("person")).astype(np.uint8)
    objects = [Object(PERSON, person, tuple(p for p in parts if p[1].any()))] if person.any() else []
    write_parts(root / "human_parts" / f"{name}.mat", name, objects)
    write(root / "sal_distill" / f"{name}.png", labels["sal"] * np.uint8(255))
    write(root / "normals_distill" / f"{name}.png", codes(labels["normals"]))


@pytest.fixture(scope="module")
def sound_pascal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "PASCALContext"
    for part, first in (("train", 1), ("val", 101)):
        for index, name in enumerate(ids(7, first)):
            pascal_room(root, name, index, part)
        write_list(root / "ImageSets" / "Context" / f"{part}.txt", ids(7, first))
    return root


def test_pascal_passes_and_its_damages_are_found(sound_pascal: Path, tmp_path: Path) -> None:
    result = verify(sound_pascal)
    assert result.name == "pascal"
    assert set(result.tasks) == set(PascalContext.task_options())
    assert damages(result) == {}
    for task in ("semseg", "sal", "edge"):
        assert row(result, f"{task} on image").verdict == "ok", row(result, f"{task} on image")
    assert row(result, "semseg most frequent").value.startswith("background")

    broken = Path(shutil.copytree(sound_pascal, tmp_path / "PASCALContext"))
    change(broken / "sal_distill", lambda array: np.roll(array, 6, axis=1))
    change(broken / "semseg" / "pascal-context", lambda array: array + np.uint8(1))
    scipy.io.savemat(broken / "human_parts" / "0003.mat", {"other": 1})
    (broken / "pascal-context" / "trainval" / "0102.mat").unlink()
    damage = damages(verify(broken))
    assert {"sal on image", "semseg most frequent", "decoded human_parts", "files normals", "files edge"} <= set(damage)
    assert "pascal-context/trainval/0102.mat" in damage["files edge"]


def test_pascal_of_random_arrays_is_read_in_full(tmp_path: Path) -> None:
    write_archive(tmp_path / "PASCALContext")
    result = verify(tmp_path)
    assert row(result, "decoded human_parts").value == "8"
    assert row(result, "image sizes").value.startswith("4 sizes")
    assert row(result, "semseg on image").value == "too few images"


@pytest.mark.slow
def test_real_small_frames_are_sound_but_for_their_known_deviations(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (REAL / "unpack.py").is_file():
        pytest.skip("the small real frames are not beside this repository")
    subprocess.run([sys.executable, REAL / "unpack.py", tmp_path / "mini"], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    result = cli(str(ROOT / SCRIPT), str(tmp_path / "mini"))
    assert result.code == 0, result.err
    deviations = [line for line in result.out.splitlines() if "deviation:" in line]
    assert all(line.startswith("known deviation: ") for line in deviations), deviations
    for phrase in ("500 of the 654", "192x256", "otherprop", "8 bits", "pseudo-normals"):
        assert any(phrase in line for line in deviations), phrase
    assert (tmp_path / "verify_nyud_small.png").is_file()
    assert len(NYUD(tmp_path / "mini", "train", ("semseg",)).ids) == 795
    printed = cli(str(ROOT / SCRIPT), str(tmp_path / "mini"), "--frequencies").out
    assert [float(word) for word in printed.split(",")] == pytest.approx([*NYUD_SHARES, 0], abs=1e-9)

    root = tmp_path / "mini" / "NYUDv2"
    paths = sorted((root / "segmentation").iterdir())
    content = [path.read_bytes() for path in paths]
    for path, other in zip(paths, content[5:] + content[:5]):  # labels of other images
        path.write_bytes(other)
    assert "labels of other ones" in damages(verify(root, workers=2))["semseg on image"]
