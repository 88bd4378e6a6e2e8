"""Only architecture arguments reach timm."""

import pytest

from mtcl import UserError
from mtcl.models import build_backbone


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"checkpoint_path": "weights.pth"},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/x", "architecture": "mobilenetv2_100"}},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/.bashrc", "source": "url", "hf_hub_id": None}},
        {"cache_dir": "folder"},
        {"feature_cls": "fx"},
        {"scriptable": True},
        {"num_classes": 5},
        {"norm_layer": "../../x"},
        {"embed_dim": 10**9},
        {"depths": [[[[1]]]]},
        {"stage1": {"a/b": 1}},
        {5: 1},
    ],
    ids=str,
)
def test_only_architecture_arguments_reach_timm(kwargs, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(UserError, match=rf"kwargs\.{next(iter(kwargs))}[ =]"):
        build_backbone("mobilenetv2_100", kwargs=kwargs)
