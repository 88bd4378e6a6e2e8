"""Build the learning-rate schedule of a config."""

from omegaconf import DictConfig

from mtcl.config.resolve import add_key_prefix, plain
from mtcl.schedules import Schedule, build_schedule


def build_lr_schedule(config: DictConfig) -> Schedule:
    """Return the factor of the learning rates as a function of the step."""
    with add_key_prefix("schedule."):
        return build_schedule(max_steps=config.trainer.max_steps, **plain(config.schedule))
