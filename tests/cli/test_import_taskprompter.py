"""TaskPrompter's checkpoints become ours: every key accounted for, every tensor filled, the same predictions."""

import pytest
import torch
from helpers.imported_checkpoints import (
    CONFIGS,
    assert_each_from_one,
    list_channels,
    rebuild,
    to_double,
    write_published,
)
from helpers.invpt_reference import random_state
from helpers.taskprompter_reference import Reference, published_shapes

from mtcl.cli.import_checkpoint import import_checkpoint

SIZE = (128, 192)  # in windows x windows parts of 2x3 patches, or in one of 8x12
DIM, HEADS = 24, 3
POSITIONS = "backbone.pos_embed"


@pytest.mark.parametrize(
    ("data", "depth", "cross", "windows"),
    [("nyud", 8, False, 4), ("pascal", 8, True, 4), pytest.param("pascal", 24, True, 1, marks=pytest.mark.slow)],
)
def test_taskprompter_predicts_as_published(data, depth, cross, windows, tmp_path):
    """Compare without reweighting across tasks, and with it; 24 blocks that reweight have one window, as published."""
    overrides = [f"data={data}", "decoder=taskprompter", "backbone=vit_large", f"data.size=[{SIZE[0]},{SIZE[1]}]",
                 f"++backbone.kwargs={{embed_dim:{DIM},depth:{depth},num_heads:{HEADS}}}"]  # fmt: skip
    tasks = list_channels(overrides)
    state = random_state(published_shapes(tasks, SIZE, DIM, depth, HEADS, width=8, head_width=6, cross=cross))
    source = write_published(tmp_path / "theirs.pth.tar", state)
    result = import_checkpoint("taskprompter", source, tmp_path / "ours.pt", overrides, CONFIGS)
    for key, value in {"width": 8, "head_width": 6, "cross_task": cross, "windows": windows}.items():
        assert result.config_overrides[f"decoder.{key}"] == value
    # What the last block gives back to the prompts is never used, nor the position of a class token.
    unused_layer = f"backbone.blocks.{depth - 1}.attn.token_trans1"
    assert result.unused_keys == [f"{unused_layer}.weight", f"{unused_layer}.bias"]
    assert result.num_tensors == len(state) - 2
    model, ours = rebuild(tmp_path / "ours.pt")
    assert ours["step"] == 40000
    assert model.mean == (0.485, 0.456, 0.406)
    assert_each_from_one(model, {**state, POSITIONS: state[POSITIONS][:, 1:]}, num_unused=2)

    image = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        predictions = model.double().predict(image)
        references = Reference(to_double(state), list(tasks), HEADS, windows)(image)
    assert list(predictions) == list(references)
    for task, prediction in predictions.items():
        assert prediction.std() > 1e-2
        torch.testing.assert_close(prediction, references[task], rtol=1e-5, atol=1e-7)
