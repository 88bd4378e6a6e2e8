"""Build the caches of a frozen backbone's features from a config, and what fills them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from mtcl import distributed
from mtcl.config.build_data import build_augment, get_image_size
from mtcl.config.resolve import add_key_prefix, plain
from mtcl.data import Augment, FeatureCache, MultiTaskDataset, eval_loader, view_loader
from mtcl.data.partial_labels import PartiallyLabeledDataset
from mtcl.errors import UserError
from mtcl.models import DenseModel, EncoderDecoder
from mtcl.models.weights import hash_weights
from mtcl.runtime import choose_precision
from mtcl.tasks.base import Task
from mtcl.training.feature_filling import FeatureFiller, describe_format


class CachedFeatures(NamedTuple):
    """The feature caches of a run's two lists, and what fills them."""

    train: FeatureCache
    val: FeatureCache
    fillers: list[FeatureFiller]


def build_feature_caches(
    config: DictConfig,
    tasks: Mapping[str, Task],
    model: DenseModel,
    train_dataset: MultiTaskDataset,
    val_dataset: MultiTaskDataset,
    device: torch.device,
) -> CachedFeatures | None:
    """Return the feature caches of a config; None where it has none. Nothing is written or computed yet.

    Raises:
        UserError: the backbone is not frozen or sharded, the decoder reads more than the backbone's maps, there is no
            number of views, or a step shows several of an image.
    """
    data = config.data
    if data.get("feature_cache") is None:
        return None
    if not model.backbone.is_frozen:
        raise UserError(
            "data.feature_cache keeps the features of a backbone that does not change; set backbone.trainable=frozen, "
            "or data.feature_cache=null"
        )
    if not isinstance(model, EncoderDecoder):
        raise UserError(
            f"{type(model).__name__} works inside the backbone, so there are no features to keep; "
            "set data.feature_cache=null"
        )
    if config.trainer.parallel == "fsdp" and distributed.world_size() > 1:
        raise UserError(
            "data.feature_cache runs the backbone without the model around it, which trainer.parallel=fsdp can't do; "
            "use trainer.parallel=ddp"
        )
    if data.get("views_per_step", 1) > 1:
        raise UserError(
            "data.feature_cache is for one view of an image at a step; set data.views_per_step=1 or "
            "data.feature_cache=null"
        )
    if data.views is None:
        raise UserError(
            "data.feature_cache needs a number of augmented views per training image; set data.views, e.g. to 8 (1 "
            "shows each image the same way in every epoch)"
        )
    size = get_image_size(config)
    with add_key_prefix("data."):
        feature_format = describe_format(model, device, size, data.feature_precision)
    shared = describe_backbone(config, model, device) | {"size": list(size)}
    augment = build_augment(config)
    assert isinstance(augment, Augment)  # images without labels train decoder=sak, which has no feature cache
    depends_on_labels = "semseg" in tasks and augment.class_cap < 1
    images = train_dataset.dataset if isinstance(train_dataset, PartiallyLabeledDataset) else train_dataset
    train_settings = shared | {
        "images": images.fingerprint(),
        "labels": train_dataset.fingerprint() if depends_on_labels else None,
        "augmentation": plain(data.augment),
        "views_seed": data.views_seed,
    }
    val_settings = shared | {"images": val_dataset.fingerprint(), "batch size": data.eval_batch_size}
    root, name = Path(data.feature_cache), str(config.backbone.name)
    kinds = ("image", "semseg") if depends_on_labels else ("image",)
    train = FeatureCache(root, f"{name}-train", train_settings, feature_format, images, kinds)
    val = FeatureCache(root, f"{name}-val", val_settings, feature_format, val_dataset)

    train_keys = [(view, index) for view in range(data.views) for index in range(len(train_dataset.ids))]
    is_cuda = device.type == "cuda"
    train_filler = FeatureFiller(
        cache=train,
        keys=[(view, train_dataset.ids[index]) for view, index in train_keys],
        batch_size=max(data.batch_size // distributed.world_size(), 1),
        load=lambda batches: view_loader(
            train_dataset,
            tasks,
            augment,
            [[train_keys[position] for position in batch] for batch in batches],
            data.views_seed,
            data.workers,
            is_cuda,
        ),
        size=size,
        title="training images",
    )
    val_filler = FeatureFiller(
        cache=val,
        keys=[(0, name) for name in val_dataset.ids],
        batch_size=data.eval_batch_size,
        load=lambda batches: eval_loader(
            val_dataset, tasks, size, data.eval_batch_size, data.workers, pin_memory=is_cuda, batches=batches
        ),
        size=size,
        title="validation images",
        has_fixed_batches=True,
    )
    return CachedFeatures(train, val, [train_filler, val_filler])


def describe_backbone(config: DictConfig, model: EncoderDecoder, device: torch.device) -> dict[str, Any]:
    """Return what the maps of a backbone depend on, besides the images: plain containers."""
    backbone = config.backbone
    return {
        "backbone": backbone.name,
        "weights": hash_weights(model.backbone.state_dict()),
        "out_indices": plain(backbone.out_indices),
        "kwargs": plain(backbone.kwargs),
        **({} if (counted := backbone.get("maps_after", "stages")) == "stages" else {"maps_after": counted}),
        **({} if (mode := backbone.get("upsample_mode")) is None else {"upsample_mode": mode}),
        "normalisation": [list(model.mean), list(model.std)],
        "precision": choose_precision(device, config.trainer.precision),
        "channels_last": config.trainer.channels_last,
    }
