"""A refused key is answered with keys that this config has, and never with itself."""

import re

import pytest
from helpers.common import ROOT
from omegaconf import OmegaConf

from mtcl.config.compose import compose_config
from mtcl.config.overrides import refuse_idle_regularizer_keys
from mtcl.config.schema import RULES, flatten
from mtcl.errors import UserError


def refuse(overrides):
    with pytest.raises(UserError) as caught:
        compose_config(overrides, ROOT / "configs", "train")
    return str(caught.value)


def keys_of(overrides):
    config = compose_config(overrides, ROOT / "configs", "train", check=False)
    return {key for key, _ in flatten(OmegaConf.to_container(config, resolve=False))}


@pytest.mark.parametrize(
    ("base", "key"),
    [
        (["data=rooms"], "data.normals_valid"),
        (["data=rooms"], "data.options.num_classes"),
        (["decoder=multi_head"], "decoder.heads"),
        (["balancing=fixed"], "balancing.lr"),
    ],
)
def test_a_key_of_another_choice_is_not_suggested(base, key):
    assert key in RULES
    assert key not in keys_of(base)
    message = refuse([*base, f"{key}=1"])
    assert message.startswith(f"the {key.partition('.')[0]} chosen here has no key {key}; "), message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    "override",
    [
        "data.normals_vald=1",
        "normals_valid=1",
        "trainer.normals_valid=1",
        "+data.normals_vald=1",
        "+trainer.max_step=1",
        "decoder.head=1",
        "optimizer.batch_size=1",
        "checkpoint=a.pt",
        "lr=1",
    ],
)
def test_suggestions_are_keys_of_the_config(override):
    base = ["data=rooms", "decoder=multi_head"]
    message = refuse([*base, override])
    suggestions = [key for text in re.findall(r"did you mean ([^?]*)\?", message) for key in re.split(" or |, ", text)]
    present = keys_of(base)
    assert all(key in present for key in suggestions), message
    if override.partition("=")[0] in ("lr", "+trainer.max_step", "optimizer.batch_size"):
        assert suggestions, message


@pytest.mark.parametrize(
    "key",
    [
        "regularizer.weight=0.5",
        "++regularizer.options.num_pixels=8",
        "~regularizer.lr",
        "balancing.regularizer_as_objective=true",
    ],
)
def test_a_key_of_the_regularizer_without_one_is_refused(key):
    message = refuse(["seed=1", key])
    assert message.startswith(f"{key} has no effect without a regularizer")
    assert "add regularizer=contrastive" in message


def test_a_weight_in_a_file_without_a_regularizer_is_refused():
    config = compose_config([], ROOT / "configs")
    config.regularizer.weight = 0.5
    with pytest.raises(UserError, match=r"regularizer\.weight=0\.5 has no effect"):
        refuse_idle_regularizer_keys([], config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1"],
        ["regularizer=none", "regularizer.weight=0.5", "balancing.regularizer_as_objective=true"],  # of a sweep
        ["regularizer=contrastive", "regularizer.weight=0.5"],
        ["experiment=rooms_small", "regularizer.weight=0.5"],  # which names it
        ["regularizer._target_=mtcl.regularizers.Contrastive", "regularizer.weight=0.5"],
    ],
)
def test_other_keys_of_the_regularizer_are_taken(overrides):
    compose_config(overrides, ROOT / "configs")
