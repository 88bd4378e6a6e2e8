"""``mtcl predict`` as users type it: what it writes, what it leaves out, how it fails."""

import errno
import json
import math
import os
import resource
import socket
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from PIL import Image

import mtcl
from mtcl.cli.predict import images, videos
from mtcl.cli.predict import output as output_module
from mtcl.cli.train import train
from mtcl.inference.predictor import Predictor
from mtcl.metrics.boundaries.suppression import SAK, nms
from mtcl.runtime import is_out_of_memory

SCRIPT = "scripts/predict.py"
TASKS = ("semseg", "human_parts", "sal", "depth", "normals", "edge")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(composed(*TINY), folder)
    return folder


@pytest.fixture
def predict(cli, run, tmp_path):
    def run_predict(source, *arguments: str, output="out"):
        return cli(SCRIPT, str(run), str(source), f"--output={tmp_path / output}", "--device=cpu", *arguments)

    return run_predict


def picture(seed: int = 0, height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(path: Path, seed: int = 0, **size) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, **size)).save(path, format="PNG")
    return path


def video(path: Path, count: int = 5, rate: float = 29.97) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (64, 32))
    for i in range(count):
        writer.write(np.full((32, 64, 3), 8 * i, np.uint8))
    writer.release()
    return path


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def maps_of(*names: str, tasks=TASKS) -> set[str]:
    return {f"{task}/{n}.png" for task in tasks for n in names} | {f"panel/{n}.jpg" for n in names} | {"predict.json"}


def fails(result, *fragments: str) -> None:
    """Exit code 1 and one sentence that has these words in it."""
    assert result.code == 1, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    for word in fragments:
        assert word in lines[0], lines[0]


def test_maps_are_read_back(predict, run, tmp_path):
    result = predict(put(tmp_path / "a.png"))
    assert result.code == 0, result.err
    out = tmp_path / "out"
    assert written(out) == maps_of("a")
    expected = mtcl.load(run)(tmp_path / "a.png")
    facts = json.loads((out / "predict.json").read_text())
    images_read = {task: np.asarray(Image.open(out / task / "a.png")) for task in TASKS}
    for task in ("semseg", "human_parts", "sal"):
        assert np.array_equal(images_read[task], expected[task])
        assert np.array_equal(images_read[task].dtype, np.uint8)
        classes = facts["tasks"][task]["classes"]
        colours = np.asarray(Image.open(out / task / "a.png").convert("RGB"))
        assert np.array_equal(colours, mtcl.load(run).tasks[task].draw(expected[task]))
        assert len(classes) > images_read[task].max()
    scale = facts["tasks"]["depth"]["metres_per_step"]
    assert images_read["depth"].dtype == np.uint16
    assert np.array_equal(cv2.imread(str(out / "depth/a.png"), cv2.IMREAD_UNCHANGED), images_read["depth"])
    assert np.abs(images_read["depth"] * scale - expected["depth"]).max() <= 0.0005 + 1e-6
    assert expected["depth"].max() > 0.01
    assert np.abs(images_read["normals"] / 127.5 - 1 - expected["normals"]).max() <= 0.5 / 127.5 + 1e-6
    thin = nms(expected["edge"], SAK.smoothing, SAK.radius)
    assert np.abs(images_read["edge"] / 255 - thin).max() <= 0.5 / 255 + 1e-6
    assert (images_read["edge"] > 0).any()
    assert cv2.imread(str(out / "panel/a.jpg")).shape[2] == 3
    assert facts["inputs"] == {str(tmp_path / "a.png"): ["a"]}
    assert (facts["step"], facts["mode"], facts["scales"]) == (2, "resize", [1.0])


def test_a_folder_with_everything_in_it(predict, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b/a.png", "b/c/ünï ✓ 100%d.jpg", "x.png", "x.jpg", "x.jpg.png", "B.JPG"):
        put(folder / name)
    put(folder / ".hidden.png")
    put(folder / ".thumbs/d.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(put(folder / "whole.png").read_bytes()[:-200])
    (folder / "loop").symlink_to(folder)
    (folder / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    result = predict(folder, "--batch-size=3")
    bad = ("text.jpg", "empty.png", "cut.png", "itself.jpg")
    fails(result, "4 of 12 images", "see above")
    for name in bad:
        assert f"skipped: {folder / name}" in result.err
    names = ("a", "b/a", "b/c/ünï ✓ 100%d", "x.png", "x.jpg", "x.jpg.png", "B", "whole")
    assert written(out) == maps_of(*names)
    assert "8 images in" in result.out
    times_before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    put(folder / "new.png", seed=7)
    again = predict(folder)
    fails(again, "4 of 13 images")
    assert "8 of 13 images have been predicted before" in again.out
    assert {path: path.stat().st_mtime_ns for path in times_before} == times_before
    assert (out / "edge/new.png").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="names are Unicode there")
def test_a_name_that_is_not_unicode(predict, tmp_path):
    folder = tmp_path / "in"
    put(folder / "a.png")
    os.rename(os.fsencode(folder / "a.png"), os.fsencode(folder) + b"/\xff\xfe.png")
    assert predict(folder, "--tasks=depth", "--no-panel").code == 0
    assert os.listdir(os.fsencode(tmp_path / "out/depth")) == [b"\xff\xfe.png"]
    os.rename(os.fsencode(folder) + b"/\xff\xfe.png", os.fsencode(folder) + b"/\xff.mp4")
    fails(predict(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")), "not UTF-8")  # OpenCV would crash


def test_names_of_many_kinds_stay_apart(tmp_path):
    files = [tmp_path / n for n in ("a.jpg", "a.png", "a.jpg.png", "a.b.png", "a.b.jpg", "c.jpg", "d/a.jpg")]
    names = output_module.output_names(files, tmp_path)
    assert len(set(names.values())) == len(files)
    assert names[tmp_path / "c.jpg"] == "c"


def test_words_of_the_command(predict, tmp_path, monkeypatch):
    put(tmp_path / "in/a.png", height=150, width=90)
    put(tmp_path / "in/b.png", height=24, width=40)
    calls = []
    batch = Predictor.predict_batch

    def watched(self, pictures):
        calls.append((len(pictures), self.mode, self.flip, self.scales, self.precision, list(self.tasks)))
        return batch(self, pictures)

    monkeypatch.setattr(Predictor, "predict_batch", watched)
    arguments = (
        "--mode=sliding_window",
        "--flip",
        "--scales=0.5,1",
        "--batch-size=2",
        "--precision=bf16",
        "--tasks=depth,sal",
        "--no-panel",
    )
    result = predict(tmp_path / "in", *arguments)
    assert result.code == 0, result.err
    assert calls == [(2, "sliding_window", True, (0.5, 1.0), "bf16", ["sal", "depth"])]
    assert written(tmp_path / "out") == maps_of("a", "b", tasks=("sal", "depth")) - {"panel/a.jpg", "panel/b.jpg"}
    assert Image.open(tmp_path / "out/depth/a.png").size == (90, 150)


def test_wrong_words(cli, predict, run, tmp_path):
    put(tmp_path / "a.png")
    for arguments, message in [
        (["--mod=full"], "did you mean --mode?"),
        (["--mode=huge"], "choose from"),
        (["--flip=yes"], "ignored explicit argument"),
        (["--batch-size=0"], "whole number"),
        (["--scales=a"], "numbers"),
        (["--scales=9"], "0.1 to 4"),
        (["--seconds=-1"], "above 0"),
        (["--seconds=nan"], "above 0"),
        (["--tasks=flow"], "has no task flow"),
        (["--tasks="], "empty"),
        (["flip=true"], "options are written --name VALUE"),
        (["--output="], "--output: give a path"),
    ]:
        fails(predict(tmp_path / "a.png", *arguments), message)
    fails(predict(tmp_path / "none.png"), "none.png does not exist")
    fails(predict(tmp_path / "none.mp4"), "none.mp4 does not exist")
    (tmp_path / "empty").mkdir()
    fails(predict(tmp_path / "empty"), "holds no image")
    fails(predict(tmp_path / "a.png", output="a.png"), "is a file")
    assert not (tmp_path / "out").exists()
    fails(cli(SCRIPT, "--output=b"), "required: CHECKPOINT, INPUT")
    fails(cli(SCRIPT, "none.pt", f"{tmp_path}/a.png", f"--output={tmp_path}/out"), "none.pt does not exist")
    assert "--mode {resize,sliding_window,full}" in cli(SCRIPT, "--help").out


def test_what_is_no_file_is_not_waited_for_and_names_do_not_reach_the_terminal_raw(predict, tmp_path):
    """FIFOs, devices, sockets, folders and loops named as images; names with escape codes and line breaks."""
    folder = tmp_path / "in"
    put(folder / "ok.png")
    put(folder / "\x1b[31mred\nerror: forged\u202e.png")
    (folder / "bad\x1b[2J.png").write_text("x")
    (folder / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(folder / "own.png")
    (folder / "pipe.png").symlink_to(tmp_path / "fifo")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(folder)  # such a name is short
        listening.bind("sock.png")
        os.chdir(here)
        result = predict(folder)
    fails(result, "4 of 6 images could not be predicted")
    skipped = [line for line in result.err.replace("\r", "\n").split("\n") if line.startswith("skipped:")]
    assert len(skipped) == 4
    assert {Path(line.split(" is ")[0].split(" can't ")[0]).name for line in skipped} == {
        *("bad\\x1b[2J.png", "loop.png", "pipe.png", "zero.png")
    }
    assert "\x1b" not in "".join(skipped)
    assert len(written(tmp_path / "out" / "depth")) == 2
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["inputs"]
    for source in (tmp_path / "fifo", "/dev/zero"):
        fails(predict(source, output="other"), f"{source} is not a regular file")
    for name in ("pipe.mp4", "zero.avi"):
        (tmp_path / name).symlink_to(tmp_path / "fifo" if name == "pipe.mp4" else "/dev/zero")
        fails(predict(tmp_path / name, output="other"), f"{name} is not a regular file")
    fails(predict("99999999999999999999", output="other"), "a camera's number is at most 999")


def test_maps_are_not_written_or_removed_through_links(predict, tmp_path):
    put(tmp_path / "in" / "sub" / "a.png")
    mine = put(tmp_path / "mine" / "a.png")
    content = mine.read_bytes()
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")  # of the output folder itself it is the user's choice
    assert predict(tmp_path / "in", "--no-panel", "--tasks=depth").code == 0
    (tmp_path / "real" / "depth" / "sub" / "a.png").unlink()
    (tmp_path / "real" / "depth" / "sub").rmdir()
    (tmp_path / "real" / "depth" / "sub").symlink_to(tmp_path / "mine")
    arguments = ("--no-panel", "--tasks=depth", "--overwrite", "--flip")
    fails(predict(tmp_path / "in", *arguments), "leads out of --output")
    assert mine.read_bytes() == content
    (tmp_path / "real" / "depth" / "sub").unlink()
    (tmp_path / "real" / "depth").rmdir()
    (tmp_path / "real" / "depth").symlink_to(tmp_path / "mine")
    fails(predict(tmp_path / "in", *arguments), "holds the link depth to ")
    assert mine.read_bytes() == content


def test_a_single_bad_file_is_told_once(predict, tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    result = predict(tmp_path / "a.jpg")
    fails(result, "a.jpg is damaged, or not an image")
    assert result.err.count("a.jpg") == 1


def test_what_is_there_stays_unless_it_is_to_be_replaced(predict, tmp_path):
    put(tmp_path / "one/a.png", seed=1)
    put(tmp_path / "two/a.png", seed=2)
    put(tmp_path / "two/b.png", seed=3)
    assert predict(tmp_path / "one").code == 0
    depth = tmp_path / "out/depth/a.png"
    depth_before = depth.read_bytes()
    result = predict(tmp_path / "two", "--tasks=depth,edge")  # another picture of the same name
    fails(result, "1 of 2 images")
    assert "another input" in result.err
    assert depth.read_bytes() == depth_before
    assert (tmp_path / "out/depth/b.png").is_file()
    facts = json.loads((tmp_path / "out/predict.json").read_text())
    assert facts["inputs"] == {str(tmp_path / "one"): ["a"], str(tmp_path / "two"): ["b"]}
    assert set(facts["tasks"]) == set(TASKS)
    for _ in range(2):  # what was refused is not taken for done the next time
        fails(predict(tmp_path / "two"), "1 of 2 images")
        assert depth.read_bytes() == depth_before
    fails(predict(tmp_path / "one", "--flip"), "flip=False, not True", "--overwrite")
    assert depth.read_bytes() == depth_before
    assert predict(tmp_path / "two", "--overwrite").code == 0
    assert depth.read_bytes() != depth_before
    facts = json.loads((tmp_path / "out/predict.json").read_text())
    assert facts["inputs"] == {str(tmp_path / "one"): [], str(tmp_path / "two"): ["a", "b"]}
    elsewhere = put(tmp_path / "mine.png")
    for content in ("{}", json.dumps(facts | {"flip": True, "inputs": {"x": ["../../mine"]}})):
        (tmp_path / "out/predict.json").write_text(content)
        fails(predict(tmp_path / "one"), "predict.json was not written by mtcl predict")
        assert predict(tmp_path / "two", "--overwrite").code == 0
    assert elsewhere.is_file()


def test_maps_of_two_models_are_never_mixed(predict, tmp_path, monkeypatch):
    for name in "abc":
        put(tmp_path / f"in/{name}.png")
    put(tmp_path / "more/d.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    assert predict(tmp_path / "in").code == predict(tmp_path / "more").code == 0
    write, calls = images.write_maps, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(images, "write_maps", interrupted)
    monkeypatch.setattr(images, "MAX_UNWRITTEN_PIXELS", -1)
    arguments = ("--flip", "--tasks=depth")
    assert predict(tmp_path / "in", *arguments, "--overwrite").code == 130
    assert written(tmp_path / "out") <= maps_of("a", "b", "c", tasks=["depth"]) | {"mine.txt"}
    monkeypatch.undo()
    result = predict(tmp_path / "in", *arguments)
    assert result.code == 0, result.err
    assert written(tmp_path / "out") == maps_of("a", "b", "c", tasks=["depth"]) | {"mine.txt"}
    facts = json.loads((tmp_path / "out/predict.json").read_text())
    assert (facts["flip"], list(facts["tasks"]), list(facts["inputs"])) == (True, ["depth"], [str(tmp_path / "in")])


def test_an_output_inside_the_input_is_not_predicted_the_next_time(predict, tmp_path):
    put(tmp_path / "in/a.png")
    for output in ("in/out", "in/out", "in/other"):
        result = predict(tmp_path / "in", "--tasks=sal", output=output)
        assert result.code == 0, result.err
        assert written(tmp_path / output) == maps_of("a", tasks=["sal"])


def test_maps_never_replace_pictures(predict, tmp_path):
    path = put(tmp_path / "in/depth/a.png")
    content_before = path.read_bytes()
    for source in (tmp_path / "in", path, path.parent):
        fails(predict(source, output="in"), "choose another --output")
    assert path.read_bytes() == content_before
    assert written(tmp_path / "in") == {"depth/a.png"}
    put(tmp_path / "in/fine/b.png")
    assert predict(tmp_path / "in/fine", "--tasks=sal", output="in").code == 0


@pytest.mark.parametrize(
    ("code", "fragments"),
    [(errno.ENOSPC, ["no space left", "free some"]), (errno.EACCES, ["out/semseg can't be written"])],
)
def test_no_space_or_no_rights(predict, tmp_path, monkeypatch, code, fragments):
    put(tmp_path / "in/a.png")
    put(tmp_path / "in/b.png")
    write_map = output_module.write_map

    def refuse(path, task, array):
        if path.name == "b.png":
            raise OSError(code, os.strerror(code), str(path))
        write_map(path, task, array)

    monkeypatch.setattr(output_module, "write_map", refuse)
    fails(predict(tmp_path / "in"), *fragments)
    assert written(tmp_path / "out") == maps_of("a")


def test_an_output_below_a_file(predict, tmp_path):
    (tmp_path / "file").touch()
    fails(predict(put(tmp_path / "a.png"), output="file/out"), "Not a directory")


def test_a_name_that_the_disk_does_not_take_leaves_the_others(predict, tmp_path):
    put(tmp_path / "in" / f"{'x' * 245}.png")
    for suffix in ("png", "jpg"):  # whose maps would be .png.png
        put(tmp_path / "in" / f"{'z' * 251}.{suffix}")
    put(tmp_path / "in/y.png")
    result = predict(tmp_path / "in")
    fails(result, "3 of 4 images")
    assert "File name too long" in result.err
    assert written(tmp_path / "out") == maps_of("y")


@pytest.mark.parametrize("method", ["read_image", "_predict_group"])  # of the thread that reads, and the main one
def test_what_is_done_stays_after_ctrl_c(predict, tmp_path, monkeypatch, method):
    for name in "abc":
        put(tmp_path / f"in/{name}.png")
    work, calls = getattr(Predictor, method), []

    def interrupted(self, item):
        if not isinstance(item, np.ndarray):
            calls.append(item)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return work(self, item)

    monkeypatch.setattr(Predictor, method, interrupted)
    result = predict(tmp_path / "in")
    assert result.code == 130
    assert "Traceback" not in result.err
    assert written(tmp_path / "out") == maps_of("a")
    result = predict(tmp_path / "in")
    assert result.code == 0
    assert "1 of 3 images have been predicted before" in result.out
    assert written(tmp_path / "out") == maps_of("a", "b", "c")


def test_too_little_memory(predict, tmp_path, monkeypatch):
    put(tmp_path / "in/a.png", height=20)
    put(tmp_path / "in/big.png", height=32)
    put(tmp_path / "in/c.png", height=20)
    inner = Predictor._predict_group
    monkeypatch.setattr(Predictor, "_predict_group", lambda self, pictures: (
        torch.empty(10**15) if len(pictures) > 1 or len(pictures[0]) == 32 else inner(self, pictures)
    ))  # fmt: skip
    result = predict(tmp_path / "in", "--batch-size=3")
    fails(result, "1 of 3 images", "big.png")
    assert "40 x 32 pixels are too many for the memory of cpu" in result.err
    assert written(tmp_path / "out") == maps_of("a", "c")


def test_too_little_memory_to_write(predict, tmp_path, monkeypatch):
    for name in "abc":
        put(tmp_path / f"in/{name}.png")
    write_map = output_module.write_map

    def heavy(path, task, array):
        if path.name == "b.png" and task.name == "edge":
            raise MemoryError
        write_map(path, task, array)

    monkeypatch.setattr(output_module, "write_map", heavy)
    fails(predict(tmp_path / "in"), "1 of 3 images", "b.png")
    assert maps_of("a", "c") <= written(tmp_path / "out")
    monkeypatch.undo()
    assert predict(tmp_path / "in").code == 0  # b's are not whole, so they are made again
    assert written(tmp_path / "out") == maps_of("a", "b", "c")


@pytest.mark.slow
def test_few_unwritten_maps_are_kept(predict, tmp_path, monkeypatch):
    """However slow the disk is, the model waits for it."""
    for i in range(12):
        put(tmp_path / f"in/{i}.png")
    write, work, most, waiting = images.write_maps, Predictor._predict_group, [], []

    def counted(self, pictures):
        waiting.extend(pictures)
        most.append(len(waiting))
        return work(self, pictures)

    def slow(*args):
        time.sleep(0.2)
        write(*args)
        waiting.pop()

    monkeypatch.setattr(Predictor, "_predict_group", counted)
    monkeypatch.setattr(images, "write_maps", slow)
    monkeypatch.setattr(images, "MAX_UNWRITTEN_PIXELS", 2 * 24 * 40)
    assert predict(tmp_path / "in").code == 0
    assert max(most) <= 4  # two wait, one more is written, the next one is predicted
    assert written(tmp_path / "out") == maps_of(*map(str, range(12)))


def test_only_a_lack_of_memory_is_one():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(10**15)
    with pytest.raises(cv2.error) as resize:
        cv2.resize(np.zeros((9, 9, 3), np.uint8), (2**21, 2**20))
    for error in (cpu.value, resize.value, torch.OutOfMemoryError("x"), MemoryError()):
        assert is_out_of_memory(error), error
    with pytest.raises(cv2.error) as other:
        cv2.resize(np.zeros((0, 0), np.uint8), (3, 3))
    for error in (other.value, RuntimeError("an illegal allocation of ids"), ValueError("DefaultCPUAllocator")):
        assert not is_out_of_memory(error), error


# Films


def test_a_video(predict, run, tmp_path):
    source = video(tmp_path / "film.mp4")
    result = predict(source, "--batch-size=2", "--save-frames", "--tasks=depth,sal")
    assert result.code == 0, result.err
    out = tmp_path / "out"
    frames = {f"{task}/film/{i:06d}.png" for task in ("depth", "sal") for i in range(5)}
    assert written(out) == frames | {"film.mp4", "predict.json"}
    film = cv2.VideoCapture(str(out / "film.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == pytest.approx(29.97, abs=0.01)
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    tiles = [film.read()[1] for _ in range(5)]
    assert [tile.shape for tile in tiles] == [tiles[0].shape] * 5
    assert tiles[4].mean() > tiles[0].mean() + 1  # the picture is in it
    assert "5 frames in" in result.out
    assert "frames/s" in result.out
    assert "100%" in result.err
    capture = cv2.VideoCapture(str(source))
    first = mtcl.load(run)(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    depth = np.asarray(Image.open(out / "depth/film/000000.png"))
    assert np.abs(depth / 1000 - first["depth"]).max() < 0.001
    film_before = (out / "film.mp4").read_bytes()
    fails(predict(source, "--tasks=depth,sal"), "film.mp4 exists already")
    assert (out / "film.mp4").read_bytes() == film_before
    fails(predict(source, "--overwrite", output="."), "is the video itself")
    assert cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_the_beginning_of_a_video(predict, tmp_path):
    result = predict(video(tmp_path / "film.avi", 20, rate=10), "--seconds=0.5", "--tasks=sal")
    assert result.code == 0, result.err
    assert cv2.VideoCapture(str(tmp_path / "out/film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_videos_that_are_none(predict, tmp_path):
    film = video(tmp_path / "whole.mp4", 1).read_bytes()
    for name, content in [("text.mp4", b"hello"), ("empty.mp4", b""), ("cut.mp4", film[: len(film) // 2])]:
        (tmp_path / name).write_bytes(content)
        result = predict(tmp_path / name)
        fails(result, name, "no frame that can be read")
        assert "[ WARN" not in result.err, "OpenCV's own"
    assert not (tmp_path / "out").exists()


def test_frames_of_a_film_and_pictures_of_a_folder_do_not_mix(predict, tmp_path):
    put(tmp_path / "in/film/000000.png")
    assert predict(tmp_path / "in", "--tasks=sal").code == 0
    map_before = (tmp_path / "out/sal/film/000000.png").read_bytes()
    source = video(tmp_path / "film.mp4")
    fails(predict(source, "--tasks=sal", "--save-frames"), "maps of another input's film/", "choose another --output")
    assert (tmp_path / "out/sal/film/000000.png").read_bytes() == map_before
    assert predict(source, "--tasks=sal").code == 0  # alone it has a name of its own

    assert predict(source, "--tasks=sal", "--save-frames", output="other").code == 0
    fails(predict(tmp_path / "in", "--tasks=sal", output="other"), "another input's film/000000")
    assert predict(tmp_path / "in", "--tasks=sal", "--flip", "--overwrite", output="other").code == 0
    assert written(tmp_path / "other") == maps_of("film/000000", tasks=["sal"])  # the film's are gone


def test_a_video_whose_length_is_wrong_in_its_header_is_read_to_its_end(predict, tmp_path, monkeypatch):
    real = cv2.VideoCapture

    class Lying:
        says: float = 0

        def __init__(self, source):
            self.capture = real(source)
            self.lies = str(source).endswith("walk.mp4") and "out" not in str(source)

        def get(self, prop):
            return self.says if self.lies and prop == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(prop)

        def __getattr__(self, name):
            return getattr(self.capture, name)

    monkeypatch.setattr(cv2, "VideoCapture", Lying)
    video(tmp_path / "walk.mp4", 5)
    for says in (2, math.nan, -1e18, math.inf):
        Lying.says = says
        result = predict(tmp_path / "walk.mp4", "--tasks=depth", "--overwrite")
        assert result.code == 0, result.err
        assert "5 frames in" in result.out
    Lying.says = 1e6
    fails(predict(tmp_path / "walk.mp4", "--tasks=depth", "--overwrite"), "only 5 of about 1000000 frames")


def test_a_video_that_ends_early(predict, tmp_path, monkeypatch):
    source, frames = video(tmp_path / "film.mp4", 20), videos.read_frames
    monkeypatch.setattr(videos, "read_frames", lambda *a: (f for f, _ in zip(frames(*a), range(3))))
    fails(predict(source, "--tasks=sal"), "only 3 of about 20 frames")
    assert cv2.VideoCapture(str(tmp_path / "out/film.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_half_a_video_is_not_left(predict, tmp_path, monkeypatch, error):
    draw, calls = videos.draw_predictions, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error("a reason")
        return draw(*args, **kwargs)

    monkeypatch.setattr(videos, "draw_predictions", failing)
    source = video(tmp_path / "film.mp4")
    if error is ValueError:
        with pytest.raises(ValueError, match="a reason"):
            predict(source)
    else:
        assert predict(source).code == (130 if error is KeyboardInterrupt else 1)
    assert os.listdir(tmp_path / "out") == ["predict.json"]


def test_a_disk_that_is_full_in_a_video(predict, tmp_path):
    source = video(tmp_path / "film.mp4", 30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        result = predict(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fails(result, "film.mp4 can't be written")
    assert os.listdir(tmp_path / "out") == ["predict.json"]


class Camera:
    """Two frames per second, for ever; then Ctrl-C."""

    def __init__(self, count: int):
        self.count = count

    def get(self, prop):
        return 10.0 if prop == cv2.CAP_PROP_FPS else -1.0

    def read(self):
        self.count -= 1
        if self.count < 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        return True, np.full((32, 64, 3), 100, np.uint8)

    def release(self):
        pass


def test_a_camera(predict, tmp_path, monkeypatch):
    fails(predict("77"), "camera 77 can't be opened")
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Camera(4) if source == 0 else capture(source))
    result = predict("0", "--tasks=sal")
    assert result.code == 0, result.err
    assert "4 frames in" in result.out
    assert capture(str(tmp_path / "out/camera_0.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) >= 6, "as long as it took"
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Camera(10**6) if source == 1 else capture(source))
    assert predict("1", "--tasks=sal", "--seconds=0.5").code == 0
