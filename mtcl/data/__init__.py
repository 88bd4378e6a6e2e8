"""Datasets, augmentation and batches: everything between files and the device."""

from mtcl.data.loading import EpochBatches, SampleDataset, collate, eval_loader, prepare, train_loader
from mtcl.data.nyud import NYUD
from mtcl.data.partial import partly_labelled
from mtcl.data.pascal import PascalContext
from mtcl.data.rooms import Rooms
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
