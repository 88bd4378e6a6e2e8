"""The multi-task baseline."""

from helpers.small_models import make_image, make_model


def test_stride_and_depth_of_the_heads():
    model = make_model(stride=8, depth=3).eval()
    output = model(make_image(1, 3, 50, 70))
    assert output.features["final"]["edge"].shape == (1, 8, 8, 12)
    assert len(model.decoder.heads["edge"]) == 3
