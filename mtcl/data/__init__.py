"""Datasets, augmentation, batches and loaders: everything between files and the device."""

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

__all__ = [
    "NYUD",
    "Augment",
    "AugmentedDataset",
    "Batch",
    "EpochBatchSampler",
    "FeatureCache",
    "FeatureFormat",
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
