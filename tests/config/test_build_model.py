"""A constructor names its parameter; the message of a config names the key."""

import pytest
from helpers.common import composed

from mtcl import UserError
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model, inline_genotype

TINY = ("data=rooms", "backbone=resnet18", "backbone.weights=none")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.name=resnet19"], "backbone.name=resnet19 is not a timm model; did you mean resnet18"),
        (["decoder=invpt", "decoder.heads=7"], r"decoder\.heads=7 must divide the widths of the stages"),
        (["decoder=mqtransformer", "decoder.heads=3"], r"decoder\.heads=3 must divide the width"),
        (["decoder=pad_net", "decoder.width=6"], r"decoder\.width=6 must be a multiple of 4"),
        (["decoder=atrc", "decoder.window=4"], r"decoder\.window=4 must be odd"),
        (["decoder=atrc", "decoder.kinds.depth.count=1"], r"decoder\.kinds\.depth\.count=1 must be a whole number"),
        (["decoder=task_tokens", "decoder.kinds.depth=log_bins"], r"decoder\.kinds\.depth=log_bins must be a mapping"),
        (["decoder=task_diffusion", "decoder.kinds.depth=class"], r"decoder\.kinds\.depth=class .*kinds\.depth=metres"),
        (["decoder=task_diffusion", "+decoder.kinds.sal=probability"], r"decoder\.kinds\.sal=probability .*=class"),
        (["decoder=task_diffusion", "~decoder.kinds.normals"], r"decoder\.kinds\.normals is missing; .*=direction"),
    ],
)
def test_messages_name_the_key(overrides, message):
    config = composed(*TINY, *overrides)
    with pytest.raises(UserError, match=f"^{message}"):
        build_model(config, build_tasks(config), pretrained=False)


def test_a_missing_weight_file_is_named_by_its_key(tmp_path):
    config = composed(*TINY, f"backbone.weights={tmp_path / 'missing.pth'}")
    with pytest.raises(UserError, match=r"^backbone\.weights=.* is not a file"):
        build_model(config, build_tasks(config), pretrained=True)


def test_a_missing_genotype_is_named_by_its_key():
    config = composed(*TINY, "decoder=atrc", "decoder.genotype=missing.json")
    with pytest.raises(UserError, match=r"^decoder\.genotype=missing.json is neither a file nor one of"):
        inline_genotype(config)
