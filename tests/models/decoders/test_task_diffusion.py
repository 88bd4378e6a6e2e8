"""TaskDiffusion: against its public code written anew, under its names; labels, noise and steps; the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.common import composed
from helpers.decoder_checks import CHANNELS, PYRAMID, TASKS, VIT, features
from helpers.invpt_reference import random_state
from helpers.published import get_published_parameters
from helpers.small_models import make_image
from helpers.task_diffusion_reference import Reference, published_shapes
from torch import Tensor, nn

from mtcl import UserError
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import TaskDiffusion, task_diffusion
from mtcl.models.decoders.task_diffusion import average_label, list_steps, sample_classes
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict
from mtcl.models.published.task_diffusion import get_config_overrides
from mtcl.training.train_step import TrainingStep

WIDTH = 8
PARTS = {"kinds": {"depth": "metres", "normals": "direction", "edge": "probability"}, "separate_tasks": ["sal"],
         "class_thresholds": {"sal": 0.85}}  # fmt: skip
NAMES = {"semseg": 5, "depth": 1, "sal": 2, "normals": 3, "edge": 1}  # in the order of the authors' code


def make(channels, strides, tasks, **options):
    return TaskDiffusion(channels, strides, tasks, **{"width": WIDTH, **PARTS, **options})


def make_labels(tasks, size, seed=0, batch=2):
    """Labels in batch layout, a fifth of the pixels void."""
    generator = torch.Generator().manual_seed(seed)
    void = torch.rand(batch, *size, generator=generator) < 0.2
    labels = {}
    for task, channels in tasks.items():
        if task in ("semseg", "sal"):
            labels[task] = torch.randint(channels, (batch, *size), generator=generator).masked_fill(void, 255)
        elif task == "normals":
            directions = F.normalize(torch.randn(batch, 3, *size, generator=generator), dim=1)
            labels[task] = directions.masked_fill(void[:, None], 0)
        else:
            value = torch.rand(batch, 1, *size, generator=generator) + 0.5
            labels[task] = (value.round() if task == "edge" else value).masked_fill(
                void[:, None], 255 if task == "edge" else 0
            )
    return labels


class Labelled(TaskDiffusion):
    """With labels in every forward pass in training, as the trainer gives them."""

    def forward(self, features, size, labels=None):
        return super().forward(features, size, make_labels(self.tasks, size, batch=len(features[0])))


def make_labelled(channels, strides, tasks, **options):
    return Labelled(channels, strides, tasks, **{"width": WIDTH, **PARTS, **options})


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Tensor], TaskDiffusion]:
    """The state of a public network without a backbone, and our decoder with these weights; both are doubles."""
    shapes = published_shapes(NAMES, (32, 48), CHANNELS[0], 4, WIDTH, blocks=2)
    state = {
        key: value
        for key, value in random_state(shapes).items()
        if key.startswith("heads.") or key.startswith("backbone.fea_fuse.")
    }
    translation = translate_state_dict(state, METHODS["task_diffusion"], list(NAMES))
    assert translation.unused_keys == []
    decoder = make([CHANNELS[0]] * 4, VIT, NAMES, blocks=2)
    ours = {key.removeprefix("decoder."): value for key, value in translation.state.items()}
    check_state_dict(ours, decoder.state_dict(), "TaskDiffusion")
    decoder.load_state_dict(ours)
    return {key: value.double() for key, value in state.items()}, decoder.double()


def make_maps(batch=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, CHANNELS[0], 2, 3, generator=generator).double() for _ in VIT]


@pytest.mark.parametrize("steps", [1, 3])
def test_inference_is_that_of_the_public_code(pair, steps):
    state, decoder = pair
    decoder.eval()
    decoder.steps = list_steps(steps)
    maps = make_maps()
    with torch.no_grad():
        predictions = decoder.predict(maps, (32, 48))
        noise = decoder._start(1, 2, 3)
        for image in range(2):
            want = Reference(state, list(NAMES), 2).sample([x[image : image + 1] for x in maps], noise, steps)
            for task, x in want.items():
                x = F.interpolate(x, (32, 48), mode="bilinear", align_corners=False)
                torch.testing.assert_close(predictions[task][image : image + 1], x, rtol=1e-5, atol=1e-7)


def test_training_is_that_of_the_public_code(pair, monkeypatch):
    """But for the void, which theirs averages in; the image is smaller than the padded frame."""
    state, decoder = pair
    decoder.train()
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    times = torch.tensor([0.2, 0.9], dtype=torch.float64)
    noise = torch.randn(2, decoder.encoder.channels, 2, 3, dtype=torch.float64)
    maps, labels = make_maps(), make_labels(NAMES, (29, 39))
    labels = {task: label.double() if label.is_floating_point() else label for task, label in labels.items()}
    labels["semseg"][:, 8, 8] = 255
    monkeypatch.setattr(torch, "rand", lambda *_, **__: times)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    with torch.no_grad():
        output = decoder(maps, (32, 48), labels)
        for image in range(2):
            rows = slice(image, image + 1)
            image_labels = {task: label[image] for task, label in labels.items()}
            predictions, auxiliary = Reference(state, list(NAMES), 2).train_pass(
                [x[rows] for x in maps],
                image_labels,
                (32, 48),
                0.999 * times[image].item(),
                noise[rows],
            )
            for got, want in ((output.predictions, predictions), (output.intermediate[0], auxiliary)):
                for task, x in want.items():
                    x = F.interpolate(x, (32, 48), mode="bilinear", align_corners=False)
                    torch.testing.assert_close(got[task][rows], x, rtol=1e-5, atol=1e-7)


# Parameters of the public classes, built with the sizes of their configs.
PUBLISHED = {
    "pascal_task_diffusion_vit_base": (768, 12),
    "pascal_task_diffusion_vit_large": (1024, 24),
    "nyud_task_diffusion_vit_large": (1024, 24),
}


@pytest.mark.parametrize(
    "experiment", [name if "base" in name else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_published_names_and_sizes(experiment):
    """Every name of the public model goes to one of ours; but for a position of a class token that theirs does not use
    there are as many parameters."""
    dim, depth = PUBLISHED[experiment]
    config = composed(f"experiment={experiment}")
    tasks, size = build_tasks(config), tuple(config.data.size)
    channels = {name: task.channels for name, task in tasks.items()}
    shapes = published_shapes(channels, size, dim, depth, config.decoder.width)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    count = get_published_parameters(experiment)
    assert sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(statistics)) == count
    with torch.device("meta"):
        theirs = {key: torch.empty(shape) for key, shape in shapes.items()}
        needed = get_config_overrides(theirs, size)
        config.backbone.kwargs = {**plain(config.backbone.kwargs), **needed["backbone"]["kwargs"]}
        model = build_model(config, tasks, pretrained=False)
    assert needed["decoder"] == {"width": config.decoder.width, "blocks": config.decoder.blocks}
    translation = translate_state_dict(theirs, METHODS["task_diffusion"], list(channels))
    assert translation.unused_keys == []
    assert len(translation.state) == len(theirs)
    check_state_dict(translation.state, model.state_dict(), "TaskDiffusion")
    assert checks.parameters(model) == count - dim


def test_a_file_of_the_variant_with_experts_is_refused():
    with pytest.raises(UserError, match="with MLoRE"):
        get_config_overrides({"heads.fpn_encoder.moe.0.router_1.semseg.1.weight": torch.ones(1)}, (32, 48))


def test_steps_go_from_noise_to_labels():
    steps = list_steps(3)
    assert [step.next_signal for step in steps[:-1]] == pytest.approx([steps[2].signal, 1], abs=1e-5)
    assert all(step.signal**2 + step.noise**2 == pytest.approx(1) for step in steps)
    assert steps[0].signal < 1e-4
    # A clean map that is predicted exactly stays the signal, and the noise stays the noise.
    clean, noise = torch.randn(2, 1, 4, 2, 2)
    step = steps[0]
    noised = step.advance(step.signal * clean + step.noise * noise, clean)
    torch.testing.assert_close(noised, step.next_signal * clean + step.next_noise * noise)


def test_labels_at_the_size_of_the_maps():
    label = torch.arange(24).view(1, 4, 6)
    label[0, 1, 1] = 255
    like = torch.zeros(1, 1, 2, 4)
    assert sample_classes(label, 24, (4, 8), like).tolist() == [[[24, 9, 11, 24], [19, 21, 23, 24]]]
    assert sample_classes(None, 24, (4, 8), like).unique().tolist() == [24]
    depth = torch.ones(1, 1, 4, 6)
    depth[0, 0, :2, :2] = torch.tensor([[0.0, 3.0], [torch.nan, 5.0]])
    value, void = average_label(depth, "metres", (4, 8), (2, 4))
    assert value.tolist() == [[[[4, 1, 1, 0], [1, 1, 1, 0]]]]
    assert void.tolist() == [[[[0.5, 0, 0, 1], [0, 0, 0, 1]]]]
    edges = torch.tensor([[0.0, 0.0], [255.0, 1.0]])[None, None]
    value, void = average_label(edges, "probability", (2, 2), (1, 1))
    assert (value.item(), void.item()) == (pytest.approx(1 / 3), 0.25)


def test_a_task_without_a_label_is_void():
    decoder = checks.build_decoder(make)
    labels = make_labels(TASKS, (32, 64))
    void = {"semseg": torch.full((2, 32, 64), 255), "depth": torch.zeros(2, 1, 32, 64)}
    outputs = []
    for given_labels in ({"normals": labels["normals"]}, labels | void, labels, None):
        torch.manual_seed(0)
        outputs.append(decoder(features((32, 64)), (32, 64), given_labels).predictions["normals"])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


def test_a_label_map_stays_within_its_scale():
    encoder = make(CHANNELS, VIT, NAMES, label_scale=0.02).encoder
    label_map = encoder.encode_labels(make_labels(NAMES, (32, 64)), (32, 64), torch.zeros(2, WIDTH, 2, 4))
    assert label_map.shape == (2, encoder.channels, 2, 4)
    assert encoder.channels == WIDTH + WIDTH // 4  # that of saliency is apart
    assert 0 < label_map.abs().max() <= 0.02


def test_inference_reads_no_labels_and_starts_from_the_same_noise():
    decoder, maps = checks.build_decoder(make).eval(), features((32, 64))
    with torch.no_grad():
        alone = decoder.predict([x[1:] for x in maps], (32, 64))
        for labels in (None, make_labels(TASKS, (32, 64))):
            predictions = decoder(maps, (32, 64), labels).predictions
            torch.testing.assert_close(predictions["depth"][1:], alone["depth"])
        decoder.noise_at_inference = True
        first, second = (decoder.predict(maps, (32, 64))["depth"] for _ in range(2))
    assert not torch.equal(first, second)


def test_noise_is_that_of_torch_s_generator():
    """So that a checkpoint, which has its state, continues bit for bit."""
    decoder, maps, labels = checks.build_decoder(make), features((32, 64)), make_labels(TASKS, (32, 64))
    torch.manual_seed(0)
    decoder(maps, (32, 64), labels)
    state = torch.get_rng_state()
    first, second = (decoder(maps, (32, 64), labels).predictions["depth"] for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(decoder(maps, (32, 64), labels).predictions["depth"], first)
    assert not torch.equal(first, second)
    assert decoder.start_noise.std().item() == pytest.approx(1, abs=0.05)


def test_a_training_step_gives_the_labels():
    backbone = build_backbone("test_resnet")
    torch.manual_seed(0)
    model = EncoderDecoder(backbone, make(backbone.channels, backbone.strides, TASKS))
    model.backbone.eval()
    image, labels, outputs = make_image(2, 3, 45, 60), make_labels(TASKS, (45, 60)), []
    for run in (
        lambda: TrainingStep(model, None)(image, labels, None, False)[0],
        lambda: model(image, labels),
        lambda: model(image),
    ):
        torch.manual_seed(1)
        outputs.append(run().predictions["depth"])
    assert outputs[0].shape == (2, 1, 45, 60)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
def test_any_tasks_on_any_backbone(tasks, strides):
    checks.check_shapes(make_labelled, tasks, strides, batch=1, training=True)


def test_a_separate_task_alone():
    decoder = checks.build_decoder(lambda *sizes: make(*sizes, separate_tasks=["semseg"]), ["semseg"])
    assert decoder.encoder.merge is None
    output = decoder(features((32, 64)), (32, 64), make_labels({"semseg": 5}, (32, 64)))
    output.predictions["semseg"].square().mean().backward()
    assert decoder.encoder.embed["semseg"].weight.grad.any()


def test_the_inference_path_gives_the_same_and_runs_no_initial_head():
    decoder, maps = checks.build_decoder(make).eval(), features((32, 64))
    with torch.no_grad():
        output = decoder(maps, (32, 64))
        ran = checks.called(decoder, lambda: decoder.predict(maps, (32, 64)))
        predictions = decoder.predict(maps, (32, 64))
    assert all(torch.equal(p, output.predictions[task]) for task, p in predictions.items())
    idle = {name for name, module in decoder.named_modules() if not list(module.children())} - ran
    assert idle
    assert all(name.startswith("initial") for name in idle - {"encoder.void"})
    assert decoder.head_weight("depth") is decoder.refine[0]["depth"].timed.conv.weight


@pytest.mark.parametrize("check", [checks.check_bf16, checks.check_shared])
def test_contract(check):
    check(make_labelled)


@pytest.mark.slow
def test_training_compiles():
    torch._dynamo.reset()
    decoder = checks.build_decoder(lambda *sizes: make(*sizes, blocks=1), ["semseg", "depth"])
    maps, labels, outputs = features((32, 64)), make_labels({"semseg": 5, "depth": 1}, (30, 60)), []
    for run in (decoder, torch.compile(decoder, fullgraph=True, backend="eager")):
        torch.manual_seed(0)
        outputs.append(run(maps, (32, 64), labels))
    for task, x in outputs[0].predictions.items():
        torch.testing.assert_close(outputs[1].predictions[task], x)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "width=6 must be a multiple of 4"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"kinds": {"depth": "metre"}}, "kinds.depth=metre must be one of class, metres"),
        ({"kinds": {}}, "kinds.depth is missing: depth has one channel"),
        (
            {"kinds": {**PARTS["kinds"], "depth": "class"}},
            "kinds.depth=class is for predictions of two channels or more",
        ),
        (
            {"kinds": {**PARTS["kinds"], "semseg": "metres"}},
            "kinds.semseg=metres is for predictions of 1 channel, semseg",
        ),
        ({"class_thresholds": {"semseg": 0.5}}, "class_thresholds.semseg needs a task of two classes"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        checks.build_decoder(lambda *sizes: make(*sizes, **options))


@pytest.mark.parametrize(("option", "value"), [("separate_tasks", ["saliency"]), ("kinds", {"dept": "metres"})])
def test_names_of_no_task_are_refused(option, value):
    with pytest.raises(UserError, match=rf"decoder\.{option}=.* among semseg, "):
        check_config({"decoder": {option: value}})


def test_the_schedule_at_its_ends():
    assert task_diffusion.cosine_log_snr(torch.tensor([0.0])).item() == pytest.approx(-math.log(1e-5))
    assert task_diffusion.cosine_log_snr(torch.tensor([0.5])).item() == pytest.approx(0, abs=1e-3)
