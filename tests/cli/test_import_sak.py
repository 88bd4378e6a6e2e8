"""SAK's checkpoints of both stages become ours: every key accounted for, the same predictions and aligned maps."""

import pytest
import torch
from helpers.common import composed
from helpers.imported_checkpoints import (
    CONFIGS,
    assert_each_from_one,
    list_channels,
    rebuild,
    to_double,
    write_published,
)
from helpers.invpt_reference import random_state
from helpers.sak_reference import Reference, published_shapes

from mtcl import UserError
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_regularizer, prepare_distillation

SIZE = (64, 128)
TEACHERS = ["second", "first"]  # in the file; the config names them the other way round
DIM, DEPTH, HEADS = 24, 8, 2
SAK = ["decoder=sak", "decoder.teachers=[first,second]", "backbone=vit_small", f"data.size=[{SIZE[0]},{SIZE[1]}]",
       f"++backbone.kwargs={{embed_dim:{DIM},depth:{DEPTH},num_heads:{HEADS}}}"]  # fmt: skip
DISTILLATION = ["regularizer=distillation"]  # of teachers with 64 channels
DISTILLATION += [f"++regularizer.options.teachers.{name}={{name:test_vit}}" for name in TEACHERS]


def make_published(tasks, **options):
    return random_state(published_shapes(tasks, TEACHERS, SIZE, DIM, DEPTH, **options))


def make_image():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("data", "router"), [("nyud", "noisy"), ("pascal", "plain"), ("nyud", "none")])
def test_the_second_stage_predicts_as_published(data, router, tmp_path):
    """With its routers of three kinds; the aligners are accounted for and dropped."""
    overrides = [*SAK, f"data={data}"]
    state = make_published(list_channels(overrides), teacher_width=64, router=router)
    source = write_published(tmp_path / "theirs.pth", state, iter_count=40000)
    result = import_checkpoint("sak", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert result.config_overrides["decoder.routing"] == ("sum" if router == "none" else "mixture")
    aligners = [key for key in state if "ts_aligners" in key]
    assert len(aligners) == 16
    assert result.unused_keys == aligners
    assert result.num_regularizer_tensors == 0
    assert result.num_tensors == len(state) - 16
    model, ours = rebuild(tmp_path / "ours.pt")
    assert ours["regularizer"] is None
    assert ours["step"] == 40000  # SAK's code saves the number of iterations, others the last one's from 0
    assert model.mean == (0.485, 0.456, 0.406)
    assert_each_from_one(model, state, num_unused=16)

    with torch.no_grad():
        predictions = model.double().predict(make_image())
        references, _ = Reference(to_double(state), HEADS)(make_image())
    assert set(predictions) == set(references)
    for task, prediction in predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, references[task], rtol=1e-5, atol=1e-7)


def test_a_student_aligns_as_published(tmp_path):
    """The first stage's adapted maps, and what its aligners, from which a second stage starts, make of them."""
    overrides = [*SAK, "data=images"]
    state = make_published({}, teacher_width=64)
    source = write_published(tmp_path / "theirs.pth", state)
    result = import_checkpoint("sak", source, tmp_path / "ours.pt", overrides, CONFIGS)
    assert result.unused_keys == []
    assert result.num_regularizer_tensors == 16
    assert result.num_tensors == len(state) - 16
    model, _ = rebuild(tmp_path / "ours.pt")
    assert_each_from_one(model, state, num_unused=16)

    second = composed(*SAK, "data=nyud", *DISTILLATION, f"decoder.weights={tmp_path}/ours.pt")
    regularizer = build_regularizer(second, build_tasks(second), model)
    prepare_distillation(second, regularizer, torch.device("cpu"), is_fresh=True)
    assert len(regularizer.state_dict()) == 16

    with torch.no_grad():
        adapted = model.double()(make_image()).features["adapted"]
        _, aligned = Reference(to_double(state), HEADS)(make_image())
        without = {key: value for key, value in to_double(state).items() if "ts_aligners" not in key}
        _, plain = Reference(without, HEADS)(make_image())
        for teacher in TEACHERS:
            for level in range(4):
                name = f"{teacher}_level{level + 1}"
                torch.testing.assert_close(adapted[name], plain[teacher][level], rtol=1e-5, atol=1e-7)
                # Aligners are applied in single precision.
                m, want = regularizer._align(name, adapted[name]), aligned[teacher][level].float()
                assert want.std() > 0.1
                torch.testing.assert_close(m, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_vit_with_lora_is_refused(tmp_path):
    overrides = [*SAK, "data=nyud"]
    state = make_published(list_channels(overrides), teacher_width=64)
    state = {key.replace(".vit.", ".vit.base_model.model."): value for key, value in state.items()}
    with pytest.raises(UserError, match="LoRA's adapters"):
        import_checkpoint("sak", write_published(tmp_path / "a.pth", state), tmp_path / "b.pt", overrides, CONFIGS)
