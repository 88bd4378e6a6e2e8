"""Compose a config from the files in ``configs/`` and overrides, outside of :func:`hydra.main`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mtcl.config.overrides import expand_home, format_error, quote_paths, refuse_idle_regularizer_keys
from mtcl.config.schema import check_config
from mtcl.errors import UserError


def find_configs() -> Path:
    """Return the folder of the config groups: ``configs`` of the checkout, or what the wheel has of it.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.with_name("configs"), package / "configs"):
        if package.name == "mtcl" and (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"{package} has no configs; install mtcl again, from a wheel or with pip install -e of a checkout")


class Composition(NamedTuple):
    """A composed config and the choice that was made in each of its groups."""

    config: DictConfig
    choices: dict[str, str | None]  # group -> choice


def compose_config(overrides: Sequence[str], configs: Path, name: str = "train", check: bool = True) -> DictConfig:
    """Compose a config as the command line would.

    Args:
        overrides: ``key=value`` and ``group=choice``, as they are typed; paths need no quotes.
        configs: the folder of the config groups.
        name: the main config, ``train`` or ``evaluate``.
        check: refuse what breaks a rule of the schema, and for ``train`` keys of a regulariser that is off.

    Returns:
        The config with interpolations, without Hydra's own part.

    Raises:
        UserError: Hydra cannot compose it, or a value breaks its key's rule; one sentence names the key.
    """
    return compose_with_choices(overrides, configs, name, check).config


def compose_with_choices(
    overrides: Sequence[str], configs: Path, name: str = "train", check: bool = True
) -> Composition:
    """Compose a config as :func:`compose_config` does, and return it with the choice of each group."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
            config = compose(name, quote_paths(overrides), return_hydra_config=True)
        choices = {
            group: None if choice is None else str(choice)
            for group, choice in config.hydra.runtime.choices.items()
            if not group.startswith("hydra/")
        }
        with open_dict(config):
            del config["hydra"]
        if check:
            finish_config(config)
            if name == "train":
                refuse_idle_regularizer_keys(overrides, config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(format_error(error)) from error
    return Composition(config, choices)


def finish_config(config: DictConfig) -> dict[str, Any]:
    """Expand ``~`` in a composed config, check it against the schema and return it as plain containers."""
    expand_home(config)
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    check_config(plain)
    return plain
