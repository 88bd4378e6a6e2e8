"""Build tasks, datasets and loaders from a config."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from mtcl import distributed
from mtcl.config.resolve import add_key_prefix, construct, locate, plain
from mtcl.data import Augment, FeatureCache, MultiTaskDataset, apply_label_assignment, eval_loader, train_loader
from mtcl.data.datasets.base import FileDataset
from mtcl.data.partial_labels import PRESENT, keep_present_labels
from mtcl.data.shards.dataset import ShardDataset
from mtcl.data.transforms import ResizedCrop
from mtcl.errors import UserError
from mtcl.tasks import TASK_NAMES, build_task
from mtcl.tasks.base import Task


def list_offered_tasks(config: DictConfig) -> dict[str, Mapping[str, Any]]:
    """Return the tasks that the config's dataset has labels for: name -> options of the task."""
    dataset = locate(config.data._target_, "data", required_attribute="task_options")
    try:
        return dict(dataset.task_options(**plain(config.data.options)))
    except (TypeError, AttributeError) as error:  # a class that only describes datasets
        raise UserError(f"data._target_={config.data._target_} is not a dataset") from error


def build_tasks(config: DictConfig) -> dict[str, Task]:
    """The tasks in use, in canonical order: the config's names among those the dataset offers; none without labels."""
    offered = list_offered_tasks(config)
    names = plain(config.tasks.names)
    if names == "auto":
        names = list(offered)
    if not names and offered:
        raise UserError("tasks.names is empty; name at least one task, or auto")
    for name in names:
        if name not in TASK_NAMES:
            build_task(name)  # says which names there are
        if name not in offered:
            labels = ", ".join(offered) or "nothing"
            raise UserError(f"tasks.names asks for {name}, but data={config.data.name} has labels for {labels} only")
    weights, extra = plain(config.loss.weights), plain(config.loss.options)
    tasks = {}
    for name in (n for n in TASK_NAMES if n in names):
        weight = weights.get(name)
        options = {**offered[name], **extra.get(name, {})}
        if name == "normals" and "normals_valid" in config.data:
            options["normals_valid"] = config.data.normals_valid
        with add_key_prefix("data."):  # normals_valid
            tasks[name] = build_task(name, weight=None if weight is None else float(weight), **options)
    return tasks


def build_dataset(
    config: DictConfig, subset: str, tasks: Mapping[str, Task], limit: int | None = None
) -> MultiTaskDataset:
    """Build the ``subset`` ("train" or "val") of the config's dataset and split; "train" with its label assignment."""
    data = config.data
    if subset != "train":
        return build_labeled_dataset(config, subset, tasks, limit)
    mode = str(data.label_assignment)
    if mode == PRESENT:
        return build_present_dataset(config, tasks, limit)
    label_tasks = list(tasks) if mode == "full" else choose_label_tasks(config, tasks)
    if data.get("shards") is not None:
        built = build_shard_dataset(config, label_tasks, _choose_limit(config, limit))
    else:
        built = build_labeled_dataset(config, subset, label_tasks, limit)
    with add_key_prefix("data."):
        return apply_label_assignment(
            built, tasks, mode, data.labels_seed, plain(data.label_fractions), label_tasks=label_tasks
        )


def choose_label_tasks(config: DictConfig, tasks: Collection[str]) -> list[str]:
    """Return the tasks among which the labels of the training images are distributed, in canonical order.

    They are those in use, or those of ``data.label_tasks``. A training on some of these has the list of images and the
    labels that it would have on all of them.

    Raises:
        UserError: ``data.label_tasks`` lacks a task in use, or names one that the dataset has no labels for.
    """
    listed = config.data.get("label_tasks")
    if listed is None:
        return list(tasks)
    if missing := [name for name in tasks if name not in listed]:
        raise UserError(
            f"data.label_tasks=[{','.join(listed)}] lacks {missing[0]}, which is in use; add it, or set "
            "data.label_tasks=null to distribute labels among the tasks in use"
        )
    offered = list_offered_tasks(config)
    if unknown := [name for name in listed if name not in offered]:
        raise UserError(
            f"data.label_tasks asks for {unknown[0]}, but data={config.data.name} has labels for "
            f"{', '.join(offered)} only"
        )
    return [name for name in TASK_NAMES if name in listed]


def build_present_dataset(config: DictConfig, tasks: Mapping[str, Task], limit: int | None = None) -> MultiTaskDataset:
    """Build the training list of the config's dataset with the labels that it has files of."""
    data = config.data
    for key in ("shards", "label_fractions"):
        if data.get(key) is not None:
            raise UserError(
                f"data.label_assignment={PRESENT} takes the labels that there are files of, which data.{key} does not "
                f"go with; leave data.{key} out"
            )
    if "missing_labels" not in inspect.signature(locate(data._target_, "data")).parameters:
        raise UserError(
            f"data.label_assignment={PRESENT} needs the layout of NYUD-v2 or PASCAL-Context (data=nyud, data=pascal), "
            f"not that of data={data.name}; use full, one, random or a file"
        )
    built = build_labeled_dataset(config, "train", tasks, limit, missing_labels=True)
    assert isinstance(built, FileDataset)
    with add_key_prefix("data."):
        return keep_present_labels(built, tasks)


def build_shard_dataset(config: DictConfig, tasks: Collection[str], limit: int | None) -> MultiTaskDataset:
    """Build the training list that the config's shards were made from, with all labels."""
    if config.data.get("feature_cache") is not None:
        raise UserError(
            "data.shards are read one after the other, but data.feature_cache needs any image at any time; leave one "
            "of them out"
        )
    with add_key_prefix("data."):
        return ShardDataset(config.data.shards, list(tasks), describe_samples(config, tasks), limit)


def describe_samples(config: DictConfig, tasks: Collection[str]) -> dict[str, Any]:
    """Return what, besides the files, images and labels depend on as a dataset reads them: plain containers."""
    data = config.data
    settings: dict[str, Any] = {"data._target_": str(data._target_), "data.split": str(data.split)}
    settings |= {f"data.options.{name}": value for name, value in plain(data.options).items()}
    if "size" in inspect.signature(locate(data._target_, "data")).parameters:
        settings["data.size"] = list(get_image_size(config))
    if list(tasks) == ["human_parts"]:  # with this task alone, images without a person are left out
        settings["tasks.names"] = list(tasks)
    return settings


def build_labeled_dataset(
    config: DictConfig, subset: str, tasks: Collection[str], limit: int | None = None, missing_labels: bool = False
) -> MultiTaskDataset:
    """Build the ``subset`` ("train" or "val") of the config's dataset and split from its files.

    All labels must be there, unless ``missing_labels``.
    """
    data = config.data
    reader = locate(data._target_, "data")
    options = {"subset": subset, "tasks": list(tasks), "split": data.split, "limit": _choose_limit(config, limit)}
    accepted = inspect.signature(reader).parameters
    if "root" in accepted:
        if data.root is None:
            raise UserError(f"data={data.name} needs data.root=FOLDER, where its files are")
        options["root"] = data.root
    elif data.root is not None:
        raise UserError(f"data.root={data.root} makes no sense with data={data.name}, which needs no files")
    if "size" in accepted:  # rendered at the size asked for
        options["size"] = get_image_size(config)
    options |= {key: data[key] for key in ("cache", "memory_map") if key in data}
    if missing_labels:
        options["missing_labels"] = True
    return construct(reader, "data.options", **options, **plain(data.options))


def _choose_limit(config: DictConfig, limit: int | None) -> int | None:
    """Return the smaller one of ``limit`` and the config's, None for all samples."""
    return min((n for n in (limit, config.data.limit) if n is not None), default=None)


def get_image_size(config: DictConfig) -> tuple[int, int]:
    """Return height and width of the frames that the model sees."""
    height, width = config.data.size
    return height, width


def build_augment(config: DictConfig) -> Augment | ResizedCrop:
    """Build the augmentation of training images."""
    augment = plain(config.data.augment)
    if "area" in augment:
        area, ratio = tuple(augment["area"]), tuple(augment["ratio"])
        return ResizedCrop(get_image_size(config), area, ratio, augment["flip"])
    augment["scale"] = tuple(augment["scale"])
    return Augment(size=get_image_size(config), **augment)


def build_train_loader(
    config: DictConfig,
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    start_step: int,
    device: torch.device,
    features: FeatureCache | None = None,
) -> DataLoader:
    """Build the endless loader of augmented training batches from ``start_step`` on, for this process's share.

    Args:
        config: the composed config.
        dataset: of the training images.
        tasks: name -> task.
        start_step: number of batches to skip.
        device: to train on.
        features: the cache of the frozen backbone's features, if there is one.
    """
    with add_key_prefix("data."):
        return train_loader(
            dataset,
            tasks,
            build_augment(config),
            batch_size=config.data.batch_size,
            seed=config.seed,
            workers=config.data.workers,
            start_step=start_step,
            pin_memory=device.type == "cuda",
            shard=(distributed.rank(), distributed.world_size()),
            skip_unreadable=config.trainer.on_unreadable == "skip",
            views=config.data.get("views"),
            views_seed=config.data.get("views_seed", 0),
            features=features,
            views_per_step=config.data.get("views_per_step", 1),
            shuffle_buffer=config.data.get("shuffle_buffer", 512),
        )


def build_eval_loader(
    config: DictConfig,
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    device: torch.device,
    features: FeatureCache | None = None,
) -> DataLoader:
    """Build the loader of validation batches, for this process's share; see :func:`build_train_loader`."""
    return eval_loader(
        dataset,
        tasks,
        get_image_size(config),
        batch_size=config.data.eval_batch_size,
        workers=config.data.workers,
        pin_memory=device.type == "cuda",
        shard=(distributed.rank(), distributed.world_size()),
        features=features,
    )
