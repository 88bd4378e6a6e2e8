"""The index of a dataset's shards: which samples each tar file has, in which order, and what they were made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtcl.data.image_io import INVALID_ID_MESSAGE, find_invalid_id
from mtcl.errors import UserError, escape_control_characters
from mtcl.safe_files import parse_json

VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: its file name.
        num_bytes: its size.
        ids: of its samples, in their order in the file.
        indices: the positions of these ids in the training list.
    """

    name: str
    num_bytes: int
    ids: list[str]
    indices: list[int]


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a training list.

    Attributes:
        settings: dataset class, split and options that the samples were read with.
        tasks: whose labels the samples have.
        shards: the tar files.
    """

    settings: Mapping[str, Any]
    tasks: list[str]
    shards: list[Shard]

    def list_ids(self) -> list[str]:
        """Return the ids in the order of the training list, which label assignments and augmentation refer to."""
        ids = [""] * sum(len(shard.ids) for shard in self.shards)
        for shard in self.shards:
            for name, index in zip(shard.ids, shard.indices):
                ids[index] = name
        return ids

    def to_json(self) -> dict[str, Any]:
        """Return the content of an index file."""
        shards = [{"name": s.name, "bytes": s.num_bytes, "ids": s.ids, "indices": s.indices} for s in self.shards]
        return {"version": VERSION, "settings": dict(self.settings), "tasks": self.tasks, "shards": shards}


def parse_index(text: bytes, url: str) -> ShardIndex:
    """Return the index in the content of a file.

    Args:
        text: JSON, as :meth:`ShardIndex.to_json` gives it.
        url: where it was read, for errors.

    Raises:
        UserError: it is damaged, of another version, or names a sample twice.
    """
    content = parse_json(text, url)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise UserError(f"{url} is no index of shards of this version; make the shards anew.")
    try:
        shards = [Shard(one["name"], one["bytes"], one["ids"], one["indices"]) for one in content["shards"]]
        index = ShardIndex(content["settings"], content["tasks"], shards)
        is_valid = _is_valid(index)
    except (KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{url} is damaged: shards, ids and positions do not fit; make the shards anew.")
    ids = index.list_ids()
    if (invalid := find_invalid_id(ids)) is not None:
        raise UserError(f"{url} lists {escape_control_characters(invalid[:80])!r}, {INVALID_ID_MESSAGE}.")
    if len(set(ids)) < len(ids):
        raise UserError(f"{url} lists a sample more than once; make the shards anew.")
    return index


def _is_valid(index: ShardIndex) -> bool:
    """Return whether all parts have their types, and the positions are those of one list."""
    texts = [*index.tasks, *(shard.name for shard in index.shards), *(id for shard in index.shards for id in shard.ids)]
    numbers = [position for shard in index.shards for position in shard.indices]
    return (
        isinstance(index.settings, dict)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in (*numbers, *(shard.num_bytes for shard in index.shards)))
        and all(0 < len(shard.ids) == len(shard.indices) for shard in index.shards)
        and sorted(numbers) == list(range(len(numbers)))
        and len(numbers) > 0
    )
