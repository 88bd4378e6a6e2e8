"""Expand patterns of shards and read shards, local ones or from anywhere, through the library webdataset.

What can stand in a pattern is what webdataset opens: a path, ``http(s)://``, ``gs://``, ``hf://``, or ``pipe:`` and a
command that writes the file to its standard output, e.g. ``pipe:aws s3 cp s3://bucket/train-{000000..000063}.tar -``.
"""

import contextlib
import itertools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mtcl.errors import ParameterError, UserError, first_line

PARAMETER = "shards"  # the parameter that errors name
MAX_SHARDS = 100_000
MAX_INDEX_BYTES = 64 << 20
INDEX_FILE = "index.json"
_TAR = re.compile(r"[^/\s'\"=]+\.tar(?![\w./-])")  # the file name in a path, a URL or a command
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError)

Members = dict[str, bytes]  # of a sample: the ending of a file's name, as "depth.npz" -> its content


def expand_pattern(pattern: str) -> dict[str, str]:
    """Return the file name of each shard of a pattern -> where it is, in order.

    Args:
        pattern: with braces as a shell has them: ``{000000..000007}``, ``{a,b}``.

    Raises:
        ParameterError: the braces are unbalanced, a name does not end in .tar, or two shards have the same.
    """
    import_webdataset()
    import braceexpand

    try:
        urls = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise ParameterError(
            PARAMETER, f"={pattern} has unbalanced braces; write e.g. train-{{000..007}}.tar"
        ) from error
    if len(urls) > MAX_SHARDS:
        raise ParameterError(PARAMETER, f"={pattern} names more than {MAX_SHARDS:,} shards; make larger ones")
    names = [match[0] if (match := _TAR.search(url)) else None for url in urls]
    if None in names:
        raise ParameterError(PARAMETER, f"={pattern} names no .tar file; give e.g. FOLDER/train-{{000..007}}.tar")
    if len(set(names)) < len(names):
        raise ParameterError(PARAMETER, f"={pattern} names a shard more than once; give each shard its own name")
    return dict(zip((str(name) for name in names), urls))


def locate_index(url: str) -> str:
    """Return where the index is that lies beside the shard at ``url``: its file name is exchanged.

    >>> locate_index("pipe:aws s3 cp s3://bucket/train-000.tar -")
    'pipe:aws s3 cp s3://bucket/index.json -'
    """
    return _TAR.sub(INDEX_FILE, url, count=1)


def local_path(url: str) -> Path | None:
    """Return the path of a file of this machine; None for a URL or a command.

    >>> local_path("data/a.tar"), local_path("https://host/a.tar")
    (PosixPath('data/a.tar'), None)
    """
    return None if urlparse(url).scheme else Path(url)


def read_all(url: str, max_bytes: int) -> bytes:
    """Return the content of the file at ``url``.

    Raises:
        UserError: it can't be read, or is larger than ``max_bytes``.
    """
    try:
        with contextlib.closing(import_webdataset().gopen(url, "rb")) as stream:
            content = stream.read(max_bytes + 1)
    except _READ_ERRORS as error:
        raise _reading_error(url, error) from error
    if len(content) > max_bytes:
        raise UserError(f"{url} has more than the {max_bytes:,} bytes that an index may have")
    return content


def read_shard(url: str) -> Iterator[tuple[str, Members]]:
    """Yield the id and the files of each sample of the shard at ``url``, in order, while it is being read.

    Raises:
        UserError: it can't be read, or is no tar file.
    """
    wds = import_webdataset()
    try:
        stream = wds.gopen(url, "rb")
        try:
            files = wds.tariterators.tar_file_expander([{"url": url, "stream": stream}])
            for sample in wds.tariterators.group_by_keys(files, keys=split_name):
                yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}
            stream.close()  # of a command that has failed, it raises
        finally:
            with contextlib.suppress(OSError):  # of a command whose output is no longer read
                stream.close()
    except _READ_ERRORS as error:
        raise _reading_error(url, error) from error


def split_name(name: str) -> tuple[str | None, str | None]:
    """Split the name of a file in a shard into the sample's id, which may have dots, and its kind with suffix.

    >>> split_name("img.001.depth.npz"), split_name("depth.npz")
    (('img.001', 'depth.npz'), (None, None))
    """
    parts = name.rsplit(".", 2)
    return (parts[0], f"{parts[1]}.{parts[2]}") if len(parts) == 3 else (None, None)


def import_webdataset() -> Any:
    """Import webdataset, an optional package.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import webdataset
    except ImportError as error:
        raise ParameterError(PARAMETER, " needs webdataset: pip install 'mtcl[shards]'") from error
    return webdataset


def _reading_error(url: str, error: Exception) -> UserError:
    """Return the ``UserError`` for a file that can't be read."""
    text = str(error.args[0]) if error.args else type(error).__name__
    reason = getattr(error, "strerror", None) or first_line(text)
    if match := re.search(r"exit (-?\d+) \(read\)", text):  # webdataset adds all arguments of the command
        reason = f"its command ended with exit code {match[1]}"
    return UserError(f"{url} can't be read ({reason}); check the path and the file, or copy it again.")
