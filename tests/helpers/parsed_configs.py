"""Parse each file of ``configs/`` once in a process: composing a config takes half of the time then."""

import copy

from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigResult

from helpers.common import ROOT

load_config = ConfigRepository.load_config
PARSED: dict[str, ConfigResult | None] = {}


def _load_once(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Load a config file, from the memory where all folders searched are Hydra's and this repository's."""
    folders = {source.path for source in self.sources if source.scheme() == "file"}
    if folders != {str(ROOT / "configs")}:
        return load_config(self, config_path)
    if config_path not in PARSED:
        PARSED[config_path] = load_config(self, config_path)
    return copy.deepcopy(PARSED[config_path])  # composing writes into what it gets


def keep_parsed_configs() -> None:
    """Have Hydra parse each config file once in this process; no test may change a file of ``configs/``."""
    ConfigRepository.load_config = _load_once  # type: ignore[method-assign]
