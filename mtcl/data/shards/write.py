"""Write the samples of a dataset into shards, with an index beside them."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.data.datasets.base import FileDataset
from mtcl.data.image_io import decode_image, read_bytes
from mtcl.data.prepare.jobs import start_output
from mtcl.data.sample import MultiTaskDataset, Sample
from mtcl.data.shards.encoding import IMAGE, IMAGE_SUFFIXES, encode_sample
from mtcl.data.shards.index import Shard, ShardIndex
from mtcl.data.shards.tar_files import INDEX_FILE, import_webdataset
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import ParameterError

ADVICE = "start again: whole shards stay"


class WrittenShards(NamedTuple):
    """Shards that are complete."""

    pattern: str  # that names them all
    num_samples: int
    num_bytes: int  # of all tar files


def write_shards(
    dataset: MultiTaskDataset,
    tasks: Sequence[str],
    settings: Mapping[str, Any],
    out: Path,
    shards: int,
    seed: int = 0,
    workers: int = 0,
) -> WrittenShards:
    """Write all samples of a training list into tar files of nearly equal numbers of samples, then their index.

    The samples are dealt at random, so that images that are neighbours in the list lie in different shards. A shard
    appears as a whole; a second run writes only those that are missing.

    Args:
        dataset: the training list, with all labels.
        tasks: names of its tasks.
        settings: dataset class, split and options that it is read with: plain containers.
        out: the folder to write.
        shards: number of tar files.
        seed: of the dealing.
        workers: processes; 0: none besides this one.

    Raises:
        UserError: there are more shards than samples, a sample can't be read, or the disk refuses.
    """
    import_webdataset()
    if shards > len(dataset.ids):
        raise ParameterError(
            "shards", f"={shards} is more than the {len(dataset.ids)} training images; make fewer shards"
        )
    identity = {
        "settings": dict(settings),
        "tasks": list(tasks),
        "images": dataset.fingerprint(),
        "shards": shards,
        "seed": seed,
    }
    with convert_disk_errors(out, ADVICE):
        start_output(out, json.loads(json.dumps(identity)))
    parts = np.array_split(np.random.default_rng(seed).permutation(len(dataset.ids)), shards)
    digits = max(6, len(str(shards - 1)))
    paths = [out / f"train-{number:0{digits}d}.tar" for number in range(shards)]
    jobs = [(path, part.tolist()) for path, part in zip(paths, parts)]
    run_jobs(partial(_write_shard, dataset), [job for job in jobs if not job[0].is_file()], workers, "shards")
    index = ShardIndex(
        settings=settings,
        tasks=list(tasks),
        shards=[
            Shard(path.name, path.stat().st_size, [dataset.ids[i] for i in indices], indices) for path, indices in jobs
        ],
    )
    with convert_disk_errors(out / INDEX_FILE, ADVICE):
        text = json.dumps(index.to_json(), ensure_ascii=False)
        write_atomically(out / INDEX_FILE, lambda temporary: temporary.write_text(text, "utf-8"))
    pattern = f"{out}/train-{{{0:0{digits}d}..{shards - 1:0{digits}d}}}.tar"
    return WrittenShards(pattern, len(dataset.ids), sum(shard.num_bytes for shard in index.shards))


def _write_shard(dataset: MultiTaskDataset, job: tuple[Path, list[int]]) -> None:
    """Write one shard atomically: (path, indices of its samples)."""
    path, indices = job

    def write(temporary: Path) -> None:
        """Write the samples one after the other."""
        # Equal samples give equal files: no time of writing. PAX names may be long and have any characters.
        with (
            temporary.open("wb") as file,
            import_webdataset().TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar,
        ):
            for index in indices:
                sample = dataset.read(index)
                tar.write({"__key__": sample.id, **encode_sample(sample, _read_image_file(dataset, sample))})

    with convert_disk_errors(path, ADVICE):
        write_atomically(path, write)


def _read_image_file(dataset: MultiTaskDataset, sample: Sample) -> tuple[str, bytes] | None:
    """Return suffix and content of the image's own file, which is smaller than a PNG; None where it is another image.

    It is another one where a dataset makes its images smaller.
    """
    if not isinstance(dataset, FileDataset):
        return None
    (path,) = dataset.source_files(IMAGE, sample.id)
    suffix, data = path.suffix.lower().removeprefix("."), read_bytes(path)
    is_same = suffix in IMAGE_SUFFIXES and np.array_equal(decode_image(path, data), sample.image)
    return (suffix, data) if is_same else None
