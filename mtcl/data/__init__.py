"""Datasets, augmentation and batches: everything between files and the device."""

from mtcl.data.datasets.nyud import NYUD
from mtcl.data.datasets.pascal_context import PascalContext
from mtcl.data.datasets.rooms import Rooms
from mtcl.data.loader import EpochBatches, SampleDataset, collate, eval_loader, prepare, train_loader
from mtcl.data.partial_labels import partly_labelled
from mtcl.data.sample import Batch, Reader, Sample, SampleMeta
from mtcl.data.transforms import Augment, finish

__all__ = [
    "NYUD",
    "Augment",
    "Batch",
    "EpochBatches",
    "PascalContext",
    "Reader",
    "Rooms",
    "Sample",
    "SampleDataset",
    "SampleMeta",
    "collate",
    "eval_loader",
    "finish",
    "partly_labelled",
    "prepare",
    "train_loader",
]
