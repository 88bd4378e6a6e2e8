"""Tests may keep parsed config files: what is composed from them is what Hydra composes by itself."""

from helpers import parsed_configs
from helpers.common import ROOT
from hydra._internal.config_repository import ConfigRepository
from omegaconf import OmegaConf

from mtcl.config.compose import compose_config, compose_with_choices


def test_a_config_from_kept_files_is_hydras(monkeypatch):
    overrides = [
        "experiment=rooms",
        "regularizer=mtpsl",
        "+recipe=atrc",
        "balancing=dwa",
        "balancing.every=2",
    ]
    first, again = (compose_with_choices(overrides, ROOT / "configs", check=False) for _ in range(2))
    assert parsed_configs.PARSED
    monkeypatch.setattr(ConfigRepository, "load_config", parsed_configs.load_config)
    by_hydra = compose_with_choices(overrides, ROOT / "configs", check=False)
    assert first == again == by_hydra
    assert OmegaConf.to_yaml(first.config) == OmegaConf.to_yaml(again.config) == OmegaConf.to_yaml(by_hydra.config)


def test_files_elsewhere_are_read_each_time(tmp_path):
    for name in "ab":
        (tmp_path / "train.yaml").write_text(f"name: {name}\n")
        assert compose_config([], tmp_path, check=False) == {"name": name}
