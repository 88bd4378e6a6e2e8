"""Datasets, augmentation, batches and loaders: everything between files and the device."""

from typing import TYPE_CHECKING

from mtcl.lazy_imports import import_on_use

if TYPE_CHECKING:
    from mtcl.data.datasets.images import Images
    from mtcl.data.datasets.mtan import NYUD13, CityscapesMTL
    from mtcl.data.datasets.nyud import NYUD
    from mtcl.data.datasets.pascal_context import PascalContext
    from mtcl.data.datasets.rooms import Rooms
    from mtcl.data.device_batch import prepare_batch, prepare_features
    from mtcl.data.feature_cache import FeatureCache, FeatureFormat
    from mtcl.data.loader import (
        AugmentedDataset,
        EpochBatchSampler,
        collate,
        eval_loader,
        train_loader,
        view_loader,
    )
    from mtcl.data.partial_labels import apply_label_assignment
    from mtcl.data.sample import Batch, MultiTaskDataset, Sample, SampleMeta
    from mtcl.data.transforms import Augment, finalize_labels

__getattr__ = import_on_use(
    __name__,
    {
        "Augment": "mtcl.data.transforms",
        "AugmentedDataset": "mtcl.data.loader",
        "Batch": "mtcl.data.sample",
        "CityscapesMTL": "mtcl.data.datasets.mtan",
        "EpochBatchSampler": "mtcl.data.loader",
        "FeatureCache": "mtcl.data.feature_cache",
        "FeatureFormat": "mtcl.data.feature_cache",
        "Images": "mtcl.data.datasets.images",
        "MultiTaskDataset": "mtcl.data.sample",
        "NYUD": "mtcl.data.datasets.nyud",
        "NYUD13": "mtcl.data.datasets.mtan",
        "PascalContext": "mtcl.data.datasets.pascal_context",
        "Rooms": "mtcl.data.datasets.rooms",
        "Sample": "mtcl.data.sample",
        "SampleMeta": "mtcl.data.sample",
        "apply_label_assignment": "mtcl.data.partial_labels",
        "collate": "mtcl.data.loader",
        "eval_loader": "mtcl.data.loader",
        "finalize_labels": "mtcl.data.transforms",
        "prepare_batch": "mtcl.data.device_batch",
        "prepare_features": "mtcl.data.device_batch",
        "train_loader": "mtcl.data.loader",
        "view_loader": "mtcl.data.loader",
    },
)

__all__ = [
    "NYUD",
    "NYUD13",
    "Augment",
    "AugmentedDataset",
    "Batch",
    "CityscapesMTL",
    "EpochBatchSampler",
    "FeatureCache",
    "FeatureFormat",
    "Images",
    "MultiTaskDataset",
    "PascalContext",
    "Rooms",
    "Sample",
    "SampleMeta",
    "apply_label_assignment",
    "collate",
    "eval_loader",
    "finalize_labels",
    "prepare_batch",
    "prepare_features",
    "train_loader",
    "view_loader",
]
