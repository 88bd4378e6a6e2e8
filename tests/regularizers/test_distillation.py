"""The loss of distillation against a slow reading, its aligners, and its place in a training step."""

import pytest
import torch

from mtcl import UserError
from mtcl.models.output import DenseOutput
from mtcl.regularizers import Distillation
from mtcl.regularizers.distillation import MapDistance, group_levels

TEACHERS = {"first": {"name": "test_resnet"}, "second": {"name": "test_vit", "weights": "none"}}
FIRST, SECOND = [32, 48, 192, 96], [64] * 4  # channels of the teachers' maps
CHANNELS = {f"{name}_level{n}": 64 for name in TEACHERS for n in range(1, 5)}


def draw_maps(seed, size, channels=None):
    generator = torch.Generator().manual_seed(seed)
    widths = channels or dict(zip(CHANNELS, [*FIRST, *SECOND]))
    return {name: torch.randn(2, width, *size, generator=generator) for name, width in widths.items()}


def make(**options) -> Distillation:
    return Distillation({}, CHANNELS, seed=3, **{"teachers": TEACHERS, **options})


def slow_distance(student, teacher):
    """Maps of one size: one number at a time."""
    student, teacher = student.detach(), teacher.detach()
    cosines = []
    for a, b in zip(student, teacher):
        dot = sum(float(x) * float(y) for x, y in zip(a.flatten(), b.flatten()))
        norms = [sum(float(x) ** 2 for x in m.flatten()) ** 0.5 for m in (a, b)]
        cosines.append(dot / norms[0] / norms[1])
    total = 0.0
    for x, y in zip(student.flatten(), teacher.flatten()):
        difference = abs(float(x) - float(y))
        total += 0.5 * difference**2 if difference < 1 else difference - 0.5
    return 0.9 * (1 - sum(cosines) / len(cosines)) + 0.1 * total / student.numel()


def test_distance_is_that_of_a_slow_reading():
    student, teacher = (2 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    loss, cosine = MapDistance(0.9, 0.1)(student, teacher)
    assert loss.item() == pytest.approx(slow_distance(student, teacher), rel=1e-5)
    assert MapDistance(0.0, 1.0)(student, student)[0] == 0
    assert MapDistance(0.9, 0.1)(student, student)[1].item() == pytest.approx(1.0)
    assert -1 <= cosine <= 1


@pytest.mark.parametrize(("student_size", "teacher_size"), [((2, 3), (4, 6)), ((4, 6), (2, 3))])
def test_maps_are_compared_at_the_larger_size(student_size, teacher_size):
    student, teacher = (torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
                        for size in (student_size, teacher_size))  # fmt: skip
    larger = max(student_size, teacher_size)
    resized = [torch.nn.functional.interpolate(m, larger, mode="bilinear") for m in (student, teacher)]
    assert MapDistance(0.9, 0.1)(student, teacher)[0].item() == pytest.approx(slow_distance(*resized), rel=1e-5)


def test_aligners_lead_to_the_teachers_channels_where_they_differ():
    regularizer = make()
    assert {name: layer.out_features for name, layer in regularizer.aligners.items()} == dict(zip(CHANNELS, FIRST))
    assert {layer.in_features for layer in regularizer.aligners.values()} == {64}
    again = make()
    assert all(torch.equal(a, b) for a, b in zip(regularizer.parameters(), again.parameters(), strict=True))


def test_loss_is_the_sum_over_teachers_and_levels():
    regularizer = make()
    student, teacher = draw_maps(0, (2, 3), CHANNELS), draw_maps(1, (2, 3))
    output = DenseOutput({}, {"adapted": student, "teacher_adapted": teacher}, [], (32, 48))
    result = regularizer.compute_loss(output, {}, regularizer.sample(0, ["a", "b"]))
    want = {"first": 0.0, "second": 0.0}
    for name, m in student.items():
        layer = dict(regularizer.aligners).get(name)
        if layer is not None:
            m = torch.einsum("oc,bchw->bohw", layer.weight, m) + layer.bias[:, None, None]
        want[name.partition("_")[0]] += slow_distance(m, teacher[name])
    assert {name: loss.item() for name, loss in result.losses.items()} == pytest.approx(want, rel=1e-5)
    assert result.loss.item() == pytest.approx(sum(want.values()), rel=1e-5)
    summary = regularizer.summary()
    assert {name: summary[f"{name}/loss"] for name in want} == pytest.approx(want, rel=1e-5)
    assert regularizer.summary() == {}


def test_without_the_teachers_maps_the_loss_is_zero_and_reaches_everything():
    regularizer = make()
    student = {name: m.requires_grad_() for name, m in draw_maps(0, (2, 3), CHANNELS).items()}
    result = regularizer.compute_loss(DenseOutput({}, {"adapted": student}, [], (32, 48)), {}, None)
    assert result.loss == 0
    result.loss.backward()
    assert all(m.grad is not None for m in student.values())
    assert all(p.grad is not None for p in regularizer.parameters())


def test_teachers_are_in_no_state_and_draw_nothing_of_torch_s_generator():
    regularizer = make()
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    regularizer.load_teachers(torch.device("cpu"))
    assert torch.equal(torch.randn(3), want)
    assert {name.partition(".")[0] for name in regularizer.state_dict()} == {"aligners"}
    assert len(list(regularizer.parameters())) == 8
    image = torch.randn(2, 3, 32, 48)
    output = regularizer.run_teachers(image, (0.5,) * 3, (0.5,) * 3)
    assert {name: m.shape[1] for name, m in output.features["adapted"].items()} == dict(
        zip(CHANNELS, [*FIRST, *SECOND])
    )
    other = Distillation({}, CHANNELS, seed=9, teachers=TEACHERS)
    other.load_teachers(torch.device("cpu"))
    again = other.run_teachers(image, (0.5,) * 3, (0.5,) * 3)
    assert all(torch.equal(m, again.features["adapted"][name]) for name, m in output.features["adapted"].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teachers": {"first": TEACHERS["first"]}},
            r"teachers lack second, which the model has adapters for",
        ),
        ({"teachers": {**TEACHERS, "second": {"weights": "hub"}}}, r"teachers\.second needs the name of a timm model"),
        ({"teachers": {**TEACHERS, "second": {"name": "test_vit", "input_size": 0}}}, r"must be a whole number from 1"),
    ],
)
def test_refuses_other_teachers_than_the_student_s(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_refuses_maps_of_tasks():
    with pytest.raises(UserError, match="feature=final has no maps for teachers; use adapted with decoder=sak"):
        group_levels({"depth": 8}, "final")
