"""Compute what a feature cache lacks, with the frozen backbone, before training begins."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from mtcl import distributed
from mtcl.data import Batch, FeatureCache, FeatureFormat, prepare_batch
from mtcl.data.feature_cache import format_bytes
from mtcl.data.loader import split_batches
from mtcl.models import DenseModel, EncoderDecoder
from mtcl.progress import progress_bar
from mtcl.runtime import autocast

log = logging.getLogger(__name__)

Key = tuple[int, str]  # view, id of the image


@dataclass(frozen=True)
class FeatureFiller:
    """Fills the cache of one list of images.

    Attributes:
        cache: to be filled.
        keys: (view, id) of every entry, in the order of ``batches``.
        batch_size: images per pass through the backbone, in one process.
        load: batches of positions in ``keys`` -> the batches of images.
        size: height and width of the frames of images, for the cache's size; some may be larger.
        title: of the list, for people.
        has_fixed_batches: the frames depend on which images make a batch: always the same, in the order of the list.
    """

    cache: FeatureCache
    keys: Sequence[Key]
    batch_size: int
    load: Callable[[list[list[int]]], Iterable[Batch]]
    size: tuple[int, int]
    title: str
    has_fixed_batches: bool = False

    def fill(self, model: DenseModel, device: torch.device, precision: str) -> None:
        """Compute and write the entries that are missing, damaged or of files that have changed; each process its part.

        Args:
            model: whose backbone is frozen.
            device: of the model.
            precision: of the backbone, see :func:`mtcl.runtime.autocast`.

        Raises:
            UserError: the disk has too little space, or features are not finite.
        """
        assert isinstance(model, EncoderDecoder)
        assert model.backbone.is_frozen
        missing = self._find_missing()
        frame = model.padded_size(self.size)
        if distributed.rank() == 0:
            self._report(len(missing), frame)
            if missing:
                self.cache.check_space(len(missing), frame)
        if not missing:
            return
        self.cache.create()
        batches = self._batches(missing)[distributed.rank() :: distributed.world_size()]
        loaded = self.load([b if self.has_fixed_batches else pad_batch(b, self.batch_size) for b in batches])
        with progress_bar(
            total=sum(map(len, batches)),
            desc=f"features ({self.title})",
            leave=False,
            disable=distributed.rank() > 0,
        ) as bar:
            for positions, batch in zip(batches, loaded):
                self._encode(model, batch, positions, device, precision)
                bar.update(len(positions))
        distributed.barrier()

    def _batches(self, missing: Sequence[int]) -> list[list[int]]:
        """Return batches of positions that contain the missing ones."""
        if not self.has_fixed_batches:
            return split_batches(missing, self.batch_size)
        lacking = set(missing)
        return [b for b in split_batches(range(len(self.keys)), self.batch_size) if lacking & set(b)]

    @torch.inference_mode()
    def _encode(
        self, model: EncoderDecoder, batch: Batch, positions: list[int], device: torch.device, precision: str
    ) -> None:
        """Run the backbone on a batch and write the maps of its first images."""
        image, _ = prepare_batch({**batch, "labels": {}}, model.mean, model.std, device)
        with autocast(device, precision):
            encoded = model.encode(image)
        maps = [m.float().cpu().numpy() for m in encoded.maps]
        for row, position in enumerate(positions):
            view, name = self.keys[position]
            assert batch["meta"][row].id == name
            self.cache.write(view, name, [m[row] for m in maps], encoded.frame)

    def _find_missing(self) -> list[int]:
        """Return the positions of the keys without an intact entry, the same list in every process."""
        missing = None
        if distributed.rank() == 0:
            desc, is_new = f"check features ({self.title})", not self.cache.folder.is_dir()
            keys = progress_bar(self.keys, desc=desc, leave=False, disable=is_new)
            missing = [position for position, (view, name) in enumerate(keys) if not self.cache.contains(view, name)]
        return distributed.broadcast_object(missing)

    def _report(self, num_missing: int, frame: tuple[int, int]) -> None:
        """Log the size of the cache and what is missing."""
        entry = self.cache.format.num_bytes(frame)
        others = self.cache.describe_others() if num_missing == len(self.keys) else None
        log.info(
            "features of %s: %d views and images of %s each, %s together, in %s: %s%s",
            self.title,
            len(self.keys),
            format_bytes(entry),
            format_bytes(entry * len(self.keys)),
            self.cache.folder,
            "all there" if not num_missing else f"{num_missing} are to be computed",
            f" ({others})" if others else "",
        )


def describe_format(
    model: EncoderDecoder, device: torch.device, size: tuple[int, int], precision: str
) -> FeatureFormat:
    """Return how a cache keeps the maps of a model's backbone.

    Args:
        model: on ``device``.
        device: of the model.
        size: height and width of an image.
        precision: of the cache, ``fp16`` or ``fp32``.

    Raises:
        ParameterError: the precision is unknown.
    """
    backbone = model.backbone
    FeatureFormat((), (), (), precision)  # refuses an unknown precision now
    with torch.inference_mode():
        maps = model.encode(torch.zeros(2, 3, *size, device=device)).maps
    last = tuple(m.is_contiguous(memory_format=torch.channels_last) and not m.is_contiguous() for m in maps)
    return FeatureFormat(tuple(backbone.channels), tuple(backbone.strides), last, precision)


def pad_batch(positions: Sequence[int], batch_size: int) -> list[int]:
    """Fill a batch up with its last position.

    Backbones round differently for other batch sizes: so the features do not depend on which others are missing.
    """
    return [*positions, *[positions[-1]] * (batch_size - len(positions))]
