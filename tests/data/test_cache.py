"""The cache of decoded arrays: never wrong, whatever happened to its files or to the files it was made from."""

import errno
import multiprocessing
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl import UserError, safe_files
from mtcl.data import cache as store_module
from mtcl.data.cache import ArrayCache, CacheEntry
from mtcl.data.image_io import read_bytes

ARRAY = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.png"
    path.write_bytes(b"the file an array is made from")
    return path


class Maker:
    """Gives an array and counts how often it was asked."""

    def __init__(self, array: np.ndarray = ARRAY) -> None:
        self.array, self.calls = array, 0

    def __call__(self) -> CacheEntry:
        self.calls += 1
        return CacheEntry(self.array, (8, 10))


def entry(folder: Path) -> Path:
    (path,) = folder.rglob("*.array")
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("array", [ARRAY, np.float32([[0.5, -1]]), np.zeros((0, 3), np.int64), ARRAY[::2, :, 1]])
def test_an_entry_is_made_once_and_read_back_equal(tmp_path: Path, source: Path, compressed: bool, array) -> None:
    make = Maker(array)
    for _ in range(2):  # the second store is another process, or another day
        store = ArrayCache(tmp_path / "cache")
        for _ in range(2):
            cached = store.get("semseg", "2008_000001", [source], make, compressed)
            np.testing.assert_array_equal(cached.array, array)
            assert cached.array.dtype == array.dtype
            assert cached.native_size == (8, 10)
    assert make.calls == 1
    assert cached.array.size == 0 or not cached.array.flags.writeable
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["2008_000001.array"]


def test_a_plain_array_is_mapped_and_a_packed_one_is_small(tmp_path: Path, source: Path) -> None:
    make = Maker(np.zeros((100, 100), np.uint8))
    ArrayCache(tmp_path).get("a", "x", [source], make)
    ArrayCache(tmp_path).get("b", "x", [source], make, compressed=True)
    assert (tmp_path / "a" / "x.array").stat().st_size > 10_000
    assert (tmp_path / "b" / "x.array").stat().st_size < 1_000


def test_kinds_and_names_are_kept_apart(tmp_path: Path, source: Path) -> None:
    store = ArrayCache(tmp_path)
    for number, (kind, name) in enumerate([("edge", "a"), ("edge", "b"), ("depth", "a")]):
        store.get(kind, name, [source], Maker(np.full((2, 2), number)))
    for number, (kind, name) in enumerate([("edge", "a"), ("edge", "b"), ("depth", "a")]):
        assert (store.get(kind, name, [source], Maker()).array == number).all()


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_noticed_or_harmless(tmp_path_factory: pytest.TempPathFactory, position, bit) -> None:
    folder = tmp_path_factory.mktemp("cache")
    (folder / "source").write_bytes(b"x")
    ArrayCache(folder).get("image", "1", [folder / "source"], Maker())
    data = bytearray(entry(folder).read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    entry(folder).write_bytes(data)
    np.testing.assert_array_equal(ArrayCache(folder).get("image", "1", [folder / "source"], Maker()).array, ARRAY)


@pytest.mark.parametrize("size", [0, 1, 20, 100, 250, -1])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_entry_is_made_anew_with_a_warning(
    tmp_path: Path, source: Path, caplog, size: int, compressed
) -> None:
    ArrayCache(tmp_path).get("image", "1", [source], Maker(), compressed)
    content = entry(tmp_path).read_bytes()
    entry(tmp_path).write_bytes(content[:size])
    make = Maker()
    np.testing.assert_array_equal(ArrayCache(tmp_path).get("image", "1", [source], make, compressed).array, ARRAY)
    assert make.calls == 1
    assert str(entry(tmp_path)) in caplog.text
    assert entry(tmp_path).read_bytes() == content


def test_an_entry_of_another_version_is_made_anew(tmp_path: Path, source: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "MAGIC", b"mtcl array 0\n\0\0\0")
    ArrayCache(tmp_path).get("image", "1", [source], Maker())
    monkeypatch.undo()
    make = Maker(ARRAY + 1)
    assert (ArrayCache(tmp_path).get("image", "1", [source], make).array == ARRAY + 1).all()
    assert make.calls == 1


def test_a_changed_source_makes_the_entry_anew(tmp_path: Path, source: Path) -> None:
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    source.write_bytes(b"the file an array is made FROM")  # of the same length
    make = Maker(ARRAY + 1)
    assert (ArrayCache(tmp_path / "cache").get("image", "1", [source], make).array == ARRAY + 1).all()
    assert make.calls == 1


def test_a_source_that_moved_or_was_unpacked_again_is_known_by_its_content(tmp_path: Path, source: Path) -> None:
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    moved = tmp_path / "elsewhere.png"
    shutil.copy(source, moved)
    os.utime(source, (1, 1))
    make = Maker()
    for path in (moved, source):
        ArrayCache(tmp_path / "cache").get("image", "1", [path], make)
    assert make.calls == 0


def test_a_source_replaced_with_its_old_times_is_noticed(tmp_path: Path, source: Path) -> None:
    """As tar and rsync do it: same name, size and time of modification."""
    status = source.stat()
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    source.write_bytes(b"the file an array is made FROM")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    make = Maker(ARRAY + 1)
    assert (ArrayCache(tmp_path / "cache").get("image", "1", [source], make).array == ARRAY + 1).all()


def test_a_moved_source_is_read_once_to_be_known_again(tmp_path: Path, source: Path, monkeypatch) -> None:
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    os.utime(source, (1, 1))
    reads = []
    monkeypatch.setattr(store_module, "read_bytes", lambda path: reads.append(path) or path.read_bytes())
    for _ in range(3):
        ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    assert len(reads) == 1


def test_an_entry_that_another_process_replaces_is_looked_at_again(tmp_path: Path, source: Path) -> None:
    mine, theirs = ArrayCache(tmp_path / "cache"), ArrayCache(tmp_path / "cache")
    mine.get("depth", "1", [source], Maker())
    (tmp_path / "other.png").write_bytes(b"of another dataset")
    theirs.get("depth", "1", [tmp_path / "other.png"], Maker(ARRAY + 1))
    assert (mine.get("depth", "1", [source], Maker()).array == ARRAY).all()


def test_a_source_that_is_gone_is_named(tmp_path: Path, source: Path) -> None:
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    source.unlink()
    with pytest.raises(UserError, match=r"source\.png does not exist"):
        ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())


def test_many_damaged_entries_are_one_warning(tmp_path: Path, source: Path, caplog) -> None:
    for name in "abc":
        ArrayCache(tmp_path).get("image", name, [source], Maker())
    for path in tmp_path.rglob("*.array"):
        path.write_bytes(b"")
    store = ArrayCache(tmp_path)
    for name in "abc":
        store.get("image", name, [source], Maker())
    assert len(caplog.records) == 1


def test_another_number_of_sources_makes_the_entry_anew(tmp_path: Path, source: Path) -> None:
    ArrayCache(tmp_path / "cache").get("image", "1", [source], Maker())
    make = Maker()
    ArrayCache(tmp_path / "cache").get("image", "1", [source, source], make)
    assert make.calls == 1


def test_a_full_disk_costs_one_warning_and_no_array(tmp_path: Path, source: Path, monkeypatch, caplog) -> None:
    def full(path: Path, mode: str) -> None:
        if mode == "rb":
            raise FileNotFoundError
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    store, make = ArrayCache(tmp_path / "cache"), Maker()
    for name in "abc":
        np.testing.assert_array_equal(store.get("image", name, [source], make).array, ARRAY)
    assert make.calls == 3
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]  # nothing half-written stays


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache.*choose another folder"):
        ArrayCache(tmp_path / "file" / "cache")


def fill(folder: Path, source: Path) -> int:
    store, make = ArrayCache(folder), Maker(np.arange(300_000, dtype=np.float32).reshape(300, 1000))
    for _ in range(3):
        for name in range(12):
            cached = store.get("depth", str(name), [source], make)
            assert (cached.array == make.array).all()
    return make.calls


@pytest.mark.slow
def test_processes_that_fill_one_store_at_once_leave_only_whole_entries(tmp_path: Path, source: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        calls = pool.starmap(fill, [(tmp_path / "cache", source)] * 2)
    assert all(count <= 12 for count in calls)
    assert fill(tmp_path / "cache", source) == 0
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 12


def read_lengths(path: Path) -> CacheEntry:
    return CacheEntry(np.frombuffer(read_bytes(path), np.uint8).copy(), (1, 1))


def test_a_source_that_is_replaced_after_it_was_decoded_makes_its_entry_stale(tmp_path: Path, source: Path) -> None:
    """The checksum is that of the bytes that were decoded, not of what the file holds by then."""
    store = ArrayCache(tmp_path / "cache")

    def make() -> CacheEntry:
        decoded = read_lengths(source)
        source.write_bytes(b"another file of the same name")
        return decoded

    store.get("semseg", "a", [source], make)
    assert store.get("semseg", "a", [source], lambda: read_lengths(source)).array.tobytes() == source.read_bytes()


def test_a_source_is_read_once_and_the_entry_has_the_same_bytes(tmp_path: Path, source: Path, monkeypatch) -> None:
    reads, read = [], safe_files.read_bytes
    monkeypatch.setattr(safe_files, "read_bytes", lambda path, limit: reads.append(path) or read(path, limit))
    other = tmp_path / "not read by make"
    other.write_bytes(b"other")
    sources = [source, other]
    store = ArrayCache(tmp_path / "cache")

    def make() -> CacheEntry:
        store.get("derived", "b", [source], lambda: read_lengths(source))  # entries may be made within another
        return CacheEntry(ARRAY, (8, 10))

    store.get("semseg", "a", sources, make)
    assert reads == sources
    sums = [zlib.crc32(path.read_bytes()) for path in sources]
    stamps = [store_module._stamp(path) for path in sources]
    want = b"".join(store_module._serialize(CacheEntry(ARRAY, (8, 10)), stamps, sums, compressed=False))
    assert (tmp_path / "cache" / "semseg" / "a.array").read_bytes() == want
