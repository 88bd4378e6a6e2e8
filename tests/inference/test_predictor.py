"""A predictor gives what an evaluation gives; large images, averages and odd sizes against slow references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY, composed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import mtcl
from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.load import LoadedModel, build_predictor, load_model
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.data import Sample, eval_loader
from mtcl.evaluation.evaluator import Evaluator
from mtcl.inference import Predictor
from mtcl.inference import predictor as module
from mtcl.models import DenseModel
from mtcl.tasks import NYUD40, TASK_NAMES, build_task
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file

TASKS = {name: build_task(name, **({"class_names": NYUD40} if name == "semseg" else {})) for name in TASK_NAMES}
FRAME = (32, 48)
CPU = torch.device("cpu")


class Synthetic(DenseModel):
    """Each pixel's prediction is a function of its colour; with ``slope`` of its place in the frame, too.

    Mirrored pictures have mirrored normals: their x is a difference of neighbours (``pure``: it is not).
    """

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self, slope: float = 0.0, pure: bool = True):
        super().__init__()
        self.slope, self.pure, self.frames = slope, pure, []
        generator = torch.Generator().manual_seed(0)
        self.mixes = {n: torch.randn(t.channels, 3, generator=generator) for n, t in TASKS.items()}

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        self.frames.append(tuple(image.shape))
        maps = {n: torch.einsum("oc,bchw->bohw", mix, image) for n, mix in self.mixes.items()}
        maps["depth"] = maps["depth"] + 9
        if not self.pure:
            row = F.pad(image[:, 0], (1, 1))
            maps["normals"] = torch.stack([row[..., 2:] - row[..., :-2], image[:, 1], image[:, 2]], dim=1)
        ramp = torch.arange(image.shape[-1]) - 2 * torch.arange(image.shape[-2])[:, None]
        return {n: raw + self.slope * ramp for n, raw in maps.items()}

    forward = backbone_parameters = shared_parameters = None


def predictor(slope: float = 0.0, pure: bool = True, frame=FRAME, **options) -> Predictor:
    return Predictor(Synthetic(slope, pure), TASKS, frame, CPU, **options)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(actual, expected, atol: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype, name
        assert array.shape == expected[name].shape, name
        if atol and array.dtype != np.uint8:
            np.testing.assert_allclose(array, expected[name], atol=atol, rtol=1e-5, err_msg=name)
        elif atol:
            assert (array != expected[name]).mean() < 0.01, name  # a tie
        else:
            assert np.array_equal(array, expected[name]), name


def decoded(raw: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: TASKS[name].decode(raw[name]) for name in TASKS}


def blendable(name: str, raw: Tensor) -> Tensor:
    """Normals of length 1: longer ones would count more."""
    return raw / raw.norm(dim=0).clamp_min(1e-12) if name == "normals" else raw


def raw_of(model: Synthetic, view: np.ndarray, frame) -> dict[str, Tensor]:
    """Raw maps (C, H, W) of a picture in the middle of a frame: the long way round."""
    height, width = view.shape[:2]
    frame = [max(f, -(-s // 32) * 32) for f, s in zip(frame, (height, width))]
    top, left_edge = (frame[0] - height) // 2, (frame[1] - width) // 2
    image = torch.zeros(1, 3, *frame)
    pixels = torch.from_numpy(view).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]
    image[0, :, top : top + height, left_edge : left_edge + width] = pixels
    return {n: raw[0, :, top : top + height, left_edge : left_edge + width] for n, raw in model.predict(image).items()}


# Against evaluate.py


@pytest.fixture(scope="module")
def ours(run):
    return mtcl.load(run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(composed(*TINY, "trainer.ema=0.5"), folder)
    return folder


class Pictures:
    """A reader of pictures whose labels are void."""

    def __init__(self, arrays):
        self.arrays, self.ids = arrays, [str(i) for i in range(len(arrays))]

    def read(self, index):
        image = self.arrays[index]
        return Sample(self.ids[index], image, {n: t.empty_label(*image.shape[:2]) for n, t in self.tasks.items()})


def evaluated(run, arrays, batch: int) -> list[dict[str, np.ndarray]]:
    """What evaluate.py's evaluator predicts, in label layout."""
    state = read_checkpoint_file(run / "checkpoints" / "last.pt")
    config = composed(*TINY)
    tasks = build_tasks(config)
    reader = Pictures(arrays)
    reader.tasks = tasks
    model = build_model(config, tasks, pretrained=False)
    model.load_state_dict(state["ema"]["model"])
    loader = eval_loader(reader, tasks, get_image_size(config), batch, workers=0)
    raw_maps = {}
    Evaluator(tasks, loader, CPU).run(
        model, on_prediction=lambda id, raw: raw_maps.update({id: {n: r.clone() for n, r in raw.items()}})
    )
    return [{n: tasks[n].decode(r) for n, r in raw_maps[id].items()} for id in reader.ids]


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_bit_equal_to_an_evaluation(run, ours, batch):
    sizes = [(32, 64)] * 3 + [(30, 60)] * 2 + [(40, 70)] + [(64, 40)] * 3 + [(10, 12), (1, 1), (1, 40), (33, 1)]
    arrays = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    expected, start = [], 0
    for group in module._group_by_size(arrays):
        expected += evaluated(run, group, batch)
    actual = []
    while start < len(arrays):
        alike = [a for a in arrays[start : start + batch] if a.shape == arrays[start].shape]
        actual += ours.predict_batch(alike)
        start += len(alike)
    for one, other in zip(actual, expected, strict=True):
        same(one, other)


def test_a_batch_of_many_sizes(ours):
    arrays = [picture(*size) for size in [(32, 64), (32, 64), (20, 30), (32, 64), (100, 100), (100, 100)]]
    for one, array in zip(ours.predict_batch(arrays), arrays, strict=True):
        same(one, ours(array), atol=1e-5)
    assert ours.predict_batch([]) == []


def test_in_three_lines(run, tmp_path):
    Image.fromarray(picture(40, 30)).save(tmp_path / "a.png")
    maps = mtcl.load(run)(tmp_path / "a.png")
    assert {n: (a.shape, a.dtype) for n, a in maps.items()} == {
        "semseg": ((40, 30), np.uint8),
        "human_parts": ((40, 30), np.uint8),
        "sal": ((40, 30), np.uint8),
        "edge": ((40, 30), np.float32),
        "normals": ((40, 30, 3), np.float32),
        "depth": ((40, 30), np.float32),
    }
    assert np.abs(np.linalg.norm(maps["normals"], axis=-1) - 1).max() < 1e-5
    assert 0 <= maps["edge"].min() <= maps["edge"].max() <= 1
    assert set(np.unique(maps["sal"])) <= {0, 1}


def test_all_kinds_of_pictures(run, ours, tmp_path):
    array = picture(20, 30)
    Image.fromarray(array).save(tmp_path / "a.png")
    for given_ in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array[:, ::-1][:, ::-1]):
        same(ours(given_), ours(array))
    lying = Image.fromarray(np.rot90(array, 1).copy())
    lying.getexif()[0x0112] = 6
    same(ours(lying), ours(array))
    for wrong in (array.tolist(), torch.zeros(3, 4, 4), None, b"a.png"):
        with pytest.raises(UserError, match="not "):
            ours(wrong)
    with pytest.raises(UserError, match="30 x 20 pixels, more than the limit of 599"):
        mtcl.load(run, max_pixels=599)(tmp_path / "a.png")


def test_some_tasks_only(run, ours):
    array = picture(20, 30)
    everything = ours(array)
    for tasks in (["depth"], ("edge", "semseg"), "depth"):
        actual = mtcl.load(run, tasks=tasks)(array)
        assert set(actual) == ({tasks} if isinstance(tasks, str) else set(tasks))
        same(actual, {name: everything[name] for name in actual})
    with pytest.raises(UserError, match=r"has no task flow; it has semseg, "):
        mtcl.load(run, tasks=["depth", "flow"])
    with pytest.raises(UserError, match="empty"):
        mtcl.load(run, tasks=[])


def test_the_running_mean_of_the_weights_is_used_where_there_is_one(run, ours, tmp_path):
    state = read_checkpoint_file(run / "checkpoints" / "last.pt")
    weights = ours.model.state_dict()
    assert all(torch.equal(w, state["ema"]["model"][k]) for k, w in weights.items())
    assert any(not torch.equal(w, state["model"][k]) for k, w in weights.items())
    write_checkpoint_file(tmp_path / "plain.pt", {**state, "ema": None})
    weights = mtcl.load(tmp_path / "plain.pt").model.state_dict()
    assert all(torch.equal(w, state["model"][k]) for k, w in weights.items())


def test_where_a_model_is_looked_for(run, ours, tmp_path):
    array = picture(20, 30)
    expected = ours(array)
    for source in (str(run), run / "checkpoints", run / "checkpoints" / "last.pt"):
        same(mtcl.load(source)(array), expected)
    for wrong, message in [
        (tmp_path, "neither an exported model"),
        (tmp_path / "none.pt", "does not exist"),
        ("none/none.pt", "does not exist"),
        (run / "config.yaml", "config.yaml"),
    ]:
        with pytest.raises(UserError, match=message):
            mtcl.load(wrong)
    cut = tmp_path / "cut.pt"
    cut.write_bytes((run / "checkpoints" / "last.pt").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut\.pt"):
        mtcl.load(cut)


def test_no_dataset_is_needed(run, tmp_path):
    """Nor is the folder that it was trained on looked at."""
    state = read_checkpoint_file(run / "checkpoints" / "last.pt")
    config = plain(composed(*TINY, "data=nyud", f"data.root={tmp_path}/gone", "backbone.weights=hub"))
    tasks = build_tasks(composed(*TINY, "data=nyud", f"data.root={tmp_path}/gone"))
    model = build_model(composed(*TINY, "data=nyud"), tasks, pretrained=False)
    meta = {**state["meta"], "tasks": describe_tasks(tasks)}
    write_checkpoint_file(
        tmp_path / "a.pt", {**state, "config": config, "meta": meta, "model": model.state_dict(), "ema": None}
    )
    assert set(mtcl.load(tmp_path / "a.pt")(picture(20, 30))) == set(tasks)


def test_wrong_options(run):
    for options, message in [
        ({"mode": "huge"}, "mode=huge"),
        ({"scales": []}, "scales="),
        ({"scales": [1, float("nan")]}, "scales="),
        ({"scales": [5]}, "scales="),
        ({"precision": "fp8"}, "precision=fp8"),
        ({"device": "tpu"}, "device=tpu"),
    ]:
        with pytest.raises(UserError, match=message):
            mtcl.load(run, **options)


def test_bf16_is_close(run):
    array = picture(32, 64)
    full, half = mtcl.load(run, precision="fp32")(array), mtcl.load(run, precision="bf16")(array)
    assert not np.array_equal(full["depth"], half["depth"])
    np.testing.assert_allclose(half["depth"], full["depth"], atol=0.05)
    assert half["depth"].dtype == np.float32


# Sizes


sides = st.integers(1, 90)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.sampled_from(["resize", "sliding_window", "full"]), st.booleans())
def test_any_size_has_maps_of_its_size(height, width, mode, flip):
    maps = predictor(mode=mode, flip=flip, scales=(1.0, 0.6))(picture(height, width))
    assert all(a.shape[:2] == (height, width) and np.isfinite(a).all() for a in maps.values())


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 2000)])
def test_long_and_thin_needs_no_huge_frame(size):
    for mode in ("resize", "sliding_window"):
        ours = predictor(mode=mode)
        assert ours(picture(*size))["depth"].shape == size
        assert all(np.prod(frame[2:]) <= 2 * np.prod(FRAME) for frame in ours.model.frames)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4000))
def test_enlarged_in_strips(height, width, low, narrow, strip):
    raw = {
        n: torch.randn(1, t.channels, low, narrow, generator=torch.Generator().manual_seed(0)) for n, t in TASKS.items()
    }
    size = (max(height, low), max(width, narrow))
    resized = {n: F.interpolate(r, size, mode="bilinear", align_corners=False)[0] for n, r in raw.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_STRIP_VALUES", strip * 40)
        for name, one in raw.items():
            parts = list(module._resize_in_strips(one[0], size))
            assert all(part.numel() <= max(strip * 40, part.shape[0] * size[1]) for part in parts)
            torch.testing.assert_close(torch.cat(parts, dim=1), resized[name], atol=1e-5, rtol=1e-5)
        # F.normalize is steep near 0, and a tie may be decided either way
        maps = predictor()._decode(raw, size)[0]
    # Depth is clipped before it is enlarged, as in an exported program.
    clipped = F.interpolate(raw["depth"].clamp(min=0), size, mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(maps["depth"], clipped, atol=1e-5)
    assert (maps["semseg"] != decoded(resized)["semseg"]).mean() < 0.01


def test_shrunk_pictures():
    """A smooth picture's maps are hardly other ones than those of the whole."""
    ramp = np.linspace(20, 230, 200)[None, :, None] * np.linspace(0.5, 1, 160)[:, None, None] * [1, 0.7, 0.4]
    array = np.round(ramp).astype(np.uint8)
    ours = predictor()
    actual, expected = ours(array), decoded(raw_of(Synthetic(), array, FRAME))
    assert len(ours.model.frames) == 1
    assert max(ours.model.frames[0][2:]) <= 64
    for name in ("depth", "edge"):
        assert np.abs(actual[name] - expected[name]).max() < 0.1, name


# Windows


@given(st.integers(1, 500), st.integers(1, 100))
def test_windows_cover_everything_and_overlap_by_half(length, window):
    window = min(length, window)
    starts = module._window_starts(length, window)
    assert starts[0] == 0
    assert starts[-1] == length - window
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= -(-window // 2)).all()


def slid(model: Synthetic, array: np.ndarray, frame) -> dict[str, np.ndarray]:
    """All windows summed up in maps of full size."""
    height, width = array.shape[:2]
    h, w = min(frame[0], height), min(frame[1], width)
    rise, run = (np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) * 2 / n for n in (h, w))
    weight = torch.from_numpy(np.outer(rise, run)).double()
    sums = {n: torch.zeros(t.channels, height, width, dtype=torch.float64) for n, t in TASKS.items()}
    weights = torch.zeros(height, width, dtype=torch.float64)
    for top in module._window_starts(height, h):
        for left_edge in module._window_starts(width, w):
            area = (..., slice(top, top + h), slice(left_edge, left_edge + w))
            weights[area] += weight
            for name, raw in raw_of(model, array[top : top + h, left_edge : left_edge + w], frame).items():
                sums[name][area] += weight * blendable(name, raw)
    enlarged = max(max(height, width) / max(frame), min(height, width) / min(frame), 1)
    sums["depth"] *= enlarged
    return decoded({n: (s / weights).float() for n, s in sums.items()})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([(32, 48), (48, 32), (32, 32), (20, 28)]))
def test_windows_against_all_of_them_in_full_size(height, width, frame):
    array = picture(height, width)
    ours = predictor(0.01, frame=frame, mode="sliding_window")
    if height * width <= 1.6 * frame[0] * frame[1] and max(height, width) <= 1.6 * max(frame):
        expected = decoded(raw_of(Synthetic(0.01), array, frame))
    else:
        expected = slid(Synthetic(0.01), array, frame)
    same(ours(array), expected, atol=1e-3)


def test_windows_of_several_pictures_at_once():
    arrays = [picture(100, 90, seed) for seed in range(3)]
    ours = predictor(0.01, mode="sliding_window")
    together = ours.predict_batch(arrays)
    assert {frame[0] for frame in ours.model.frames} == {3}
    for maps, array in zip(together, arrays):
        same(maps, predictor(0.01, mode="sliding_window")(array), atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150))
def test_windows_of_a_pixelwise_model_are_as_the_whole(height, width):
    array = picture(height, width)
    same(predictor(mode="sliding_window")(array), predictor(mode="full")(array), atol=1e-3)


def test_things_look_nearer_in_larger_pictures():
    """A constant answer for the same view, taken with three times the pixels, means three times the depth."""
    grey = np.full((96, 144, 3), 128, np.uint8)
    metres = predictor()(grey[:32, :48])["depth"].mean()
    assert predictor(mode="resize")(grey)["depth"].mean() == pytest.approx(metres, rel=1e-4)
    for mode in ("sliding_window", "full"):
        assert predictor(mode=mode)(grey)["depth"].mean() == pytest.approx(3 * metres, rel=1e-4)


# Averages


@pytest.mark.parametrize("size", [(32, 48), (31, 47), (5, 4), (100, 90)])
@pytest.mark.parametrize("mode", ["resize", "sliding_window", "full"])
def test_a_mirror_changes_nothing_for_a_symmetric_model(size, mode):
    array = picture(*size)
    if mode == "resize" and size == (100, 90):
        array = np.concatenate([array[:, :45], array[:, :45][:, ::-1]], axis=1)  # INTER_AREA need not be symmetric
    same(predictor(pure=False, mode=mode, flip=True)(array), predictor(pure=False, mode=mode)(array), atol=2e-3)


def test_the_mean_with_the_mirrored_picture():
    array = picture(32, 48)
    model = Synthetic(0.02)
    straight = raw_of(model, array, FRAME)
    mirrored = {n: raw.flip(-1) for n, raw in raw_of(model, array[:, ::-1].copy(), FRAME).items()}
    mirrored["normals"] = mirrored["normals"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    expected = decoded({n: (blendable(n, straight[n]) + blendable(n, mirrored[n])) / 2 for n in TASKS})
    same(predictor(0.02, flip=True)(array), expected, atol=1e-5)
    assert np.abs(expected["normals"] - decoded(straight)["normals"]).max() > 0.1


def test_the_mean_over_scales():
    array = np.full((32, 48, 3), (90, 120, 200), np.uint8)
    once = raw_of(Synthetic(), array, FRAME)
    ours = predictor(scales=(0.5, 1.0, 2.0))
    actual = ours(array)
    assert [frame[2:] for frame in ours.model.frames] == [(32, 48), (32, 64), (64, 96)]  # multiples of 32
    # The constant answer means half the depth in the smaller picture, the double in the larger.
    expected = decoded({**once, "depth": once["depth"] * (0.5 + 1 + 2) / 3})
    same(actual, expected, atol=1e-4)


def test_scales_of_one_are_none():
    array = picture(32, 48)
    same(predictor(0.01, scales=[1])(array), predictor(0.01)(array))


def test_scales_and_mirror_of_a_smooth_picture_agree():
    column = np.linspace(0, 255, 48)[None, :, None] * np.ones((32, 1, 3))
    array = column.astype(np.uint8)
    actual, expected = predictor(scales=(0.75, 1.5), flip=True)(array), predictor()(array)
    depth = expected["depth"] * (0.75 + 1.5) / 2
    assert np.abs(actual["depth"] - depth)[:, 2:-2].max() < 0.1
    assert (actual["semseg"] != expected["semseg"]).mean() < 0.1


def test_the_model_is_left_in_evaluation_mode(run):
    loaded = load_model(run)
    loaded.model.train()
    assert isinstance(loaded, LoadedModel)
    assert not build_predictor(loaded).model.training
