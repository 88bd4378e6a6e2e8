"""Label files made to read others' files, to exhaust the memory, to block or to end the process: one sentence each."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from helpers.common import ROOT

from mtcl import UserError
from mtcl.data import image_io as files
from mtcl.data.cache import ArrayCache, CacheEntry

SECONDS = 5


@pytest.fixture(autouse=True)
def never_a_wait() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    handler_before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler_before)


def png(width: int, height: int, colour_type: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if colour_type == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    position = data.index(b"\xff\xc0") + 5
    data[position : position + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def npy(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, depth=np.zeros((2000, 2000)))
    return buffer.getvalue()


def matlab(*variables: bytes) -> bytes:
    """A file of format 5; each variable packed."""
    compressed = [zlib.compress(variable) for variable in variables]
    body = b"".join(struct.pack("<II", 15, len(data)) + data for data in compressed)
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM" + body


def array_head(kind: int, shape: tuple[int, int], name: bytes) -> bytes:
    flags = struct.pack("<IIII", 6, 8, kind, 0)
    return (
        flags
        + struct.pack("<IIii", 5, 8, *shape)
        + struct.pack("<II", 1, len(name))
        + name.ljust(-len(name) % 8 + len(name), b"\0")
    )


def nested(levels: int) -> bytes:
    """Cells within cells."""
    inner = array_head(6, (0, 0), b"") + struct.pack("<II", 9, 0)
    lengths, heads = len(inner) + 8, []
    for level in range(levels):
        head = array_head(1, (1, 1), b"depth" if level == levels - 1 else b"")
        heads.append(struct.pack("<II", 14, len(head) + lengths) + head)
        lengths += 8 + len(head)
    return matlab(b"".join(reversed(heads)) + struct.pack("<II", 14, len(inner)) + inner)


def zeros(megabytes: int) -> bytes:
    """A variable of zeros: packed, a thousandth of its size."""
    head = array_head(6, (megabytes << 17, 1), b"depth")
    size = megabytes << 20
    return struct.pack("<II", 14, len(head) + 8 + size) + head + struct.pack("<II", 9, size) + bytes(size)


def hdf5(make: Callable[[h5py.File, Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        secret = path.with_name("secret.h5")
        with h5py.File(secret, "w") as file:
            file["depth"] = np.ones((4, 5))
        path.with_name("secret.raw").write_bytes(bytes(160))
        with h5py.File(path, "w") as file:
            make(file, secret)

    return write


def external_link(file: h5py.File, secret: Path) -> None:
    file["depth"] = h5py.ExternalLink(str(secret), "depth")


def soft_link(file: h5py.File, secret: Path) -> None:
    external_link(file, secret)
    file["other"] = file.get("depth", getlink=True)
    del file["depth"]
    file["depth"] = h5py.SoftLink("/other")


def external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("depth", (4, 5), "f8", external=[(str(secret.with_suffix(".raw")), 0, 160)])


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((4, 5), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "depth", (4, 5))
    file.create_virtual_dataset("depth", layout)


def enormous(file: h5py.File, secret: Path) -> None:
    file.create_dataset("depth", (60_000, 60_000), "f8", chunks=(100, 100), compression="gzip")


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def depth_of(path: Path) -> np.ndarray:
    return files.validate_depth(files.read_mat(path, "depth") if path.suffix == ".mat" else files.read_npy(path), path)


def object_mat(path: Path) -> None:
    scipy.io.savemat(path, {"depth": np.array([[1, "a"]], object)})


def unknown_kind(path: Path) -> None:
    """scipy looks up what it knows of a kind by its number, also far beyond its table."""
    scipy.io.savemat(path, {"depth": np.ones((4, 5))})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 9, 160), struct.pack("<II", 0x6309, 160)))


CASES: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object], str]] = {
    "PNG of 10^9 pixels": ("a.png", holding(png(40_000, 40_000, 0)), files.read_label_image, "40000x40000 pixels"),
    "palette of 10^9 pixels": ("a.png", holding(png(40_000, 40_000, 3)), files.read_label_image, "40000x40000 pixels"),
    "colours of 10^9 pixels": ("a.png", holding(png(40_000, 40_000, 2)), files.read_color_label, "40000x40000 pixels"),
    "JPEG of 10^9 pixels": ("a.jpg", holding(jpeg(40_000, 40_000)), files.read_image, "pixels"),
    "npy of objects": ("a.npy", holding(objects()), files.read_npy, "not a readable .npy"),
    "npy of 4 TB": ("a.npy", holding(npy((10**6, 10**6))), files.read_npy, "not a readable .npy"),
    "npy of 10^30 numbers": ("a.npy", holding(npy((10**15, 10**15))), files.read_npy, "not a readable .npy"),
    "npy of 40 GB": ("a.npy", holding(npy((10**5, 10**5))), files.read_npy, "not a readable .npy"),
    "npy of nothing": ("a.npy", holding(npy((0, 10**9))), depth_of, r"float32 \(0, 1000000000\)"),
    "npz called npy": ("a.npy", holding(npz()), files.read_npy, "a label is one array"),
    "mat of objects": ("a.mat", object_mat, depth_of, "depth is one floating-point array"),
    "mat nested 5,000 deep": ("a.mat", holding(nested(5000)), depth_of, "nested deeper than"),
    "mat of an unknown kind": ("a.mat", unknown_kind, depth_of, "not a readable .mat file .*kind 25353"),
    "mat of 3 GB in 3 MB": ("a.mat", None, depth_of, "unpacks to more than"),  # type: ignore[dict-item]
    "external link": ("a.mat", hdf5(external_link), depth_of, "link to another place"),
    "soft link": ("a.mat", hdf5(soft_link), depth_of, "link to another place"),
    "external storage": ("a.mat", hdf5(external_storage), depth_of, "lies in other files"),
    "virtual": ("a.mat", hdf5(virtual), depth_of, "lies in other files"),
    "HDF5 of 28 GB": ("a.mat", hdf5(enormous), depth_of, "28,800,000,000 bytes"),
    "FIFO as image": ("a.png", os.mkfifo, files.read_image, "not a regular file"),
    "FIFO as npy": ("a.npy", os.mkfifo, depth_of, "not a regular file"),
    "FIFO as mat": ("a.mat", os.mkfifo, depth_of, "not a regular file"),
    "FIFO as list": ("a.txt", os.mkfifo, lambda path: files.read_ids(path, "the list"), "not a regular file"),
    "device": ("a.png", lambda path: path.symlink_to("/dev/zero"), files.read_label_image, "not a regular file"),
    "folder": ("a.npy", Path.mkdir, depth_of, "not a regular file"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_label_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, write, read, says = CASES[case]
    path = tmp_path / name
    if write is None:  # the limit is lower here, so that the file is made in no time
        monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
        path.write_bytes(matlab(zeros(3)))
    else:
        write(path)
    with pytest.raises(UserError, match=says) as error:
        read(path)
    assert str(path) in str(error.value)


def test_the_bound_holds_for_all_variables_of_a_file_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is as large as the bound: nothing is left for the second."""
    (tmp_path / "a.mat").write_bytes(matlab(zeros(1), zeros(3)))
    monkeypatch.setattr(files, "MAX_BYTES", len(zeros(1)))
    with pytest.raises(UserError, match="unpacks to more than"):
        files.read_mat(tmp_path / "a.mat", "depth")


def test_sound_nested_and_packed_files_are_read_as_scipy_reads_them(tmp_path: Path) -> None:
    part = {"name": "head", "mask": np.eye(3)}
    for compress in (False, True):
        scipy.io.savemat(tmp_path / "a.mat", {"other": 1, "anno": {"a": {"b": [part, part]}}}, do_compression=compress)
        actual, expected = files.read_mat(tmp_path / "a.mat", "anno"), scipy.io.loadmat(tmp_path / "a.mat")["anno"]
        assert actual[0, 0]["a"].dtype == expected[0, 0]["a"].dtype
        assert repr(actual.tolist()) == repr(expected.tolist())
    (tmp_path / "b.mat").write_bytes(nested(3))
    assert files.read_mat(tmp_path / "b.mat", "depth").shape == (1, 1)


def test_a_list_of_many_ids_is_read_and_checked_at_once(tmp_path: Path) -> None:
    ids = [f"{number:07d}" for number in range(200_000)]
    (tmp_path / "train.txt").write_text("\n".join(ids))
    assert files.read_ids(tmp_path / "train.txt", "the list") == ids
    (tmp_path / "train.txt").write_text("\n".join([*ids, ids[-1]]))
    with pytest.raises(UserError, match="lists 0199999 more than once"):
        files.read_ids(tmp_path / "train.txt", "the list")


FILLING = """
import sys
from pathlib import Path
import numpy as np
from mtcl.data.cache import ArrayCache, CacheEntry
store, source = ArrayCache(Path(sys.argv[1])), Path(sys.argv[2])
array = np.full((1000, 1000, 3), 7, np.uint8)
print("begins", flush=True)
for number in range(10**6):
    store.get("image", f"{number % 50:04d}", [source], lambda: CacheEntry(array, (1000, 1000)))
    if number % 50 == 49:
        for path in store.folder.rglob("*.array"):
            path.unlink()
"""


@pytest.mark.slow
def test_a_cache_whose_writers_are_killed_never_gives_half_an_entry(tmp_path: Path) -> None:
    """Two processes fill one cache and are killed in the midst of it, again and again."""
    source = tmp_path / "source.png"
    source.write_bytes(b"x")
    signal.alarm(300)
    right = np.full((1000, 1000, 3), 7, np.uint8)
    for attempt in range(3):
        arguments = [sys.executable, "-c", FILLING, str(tmp_path / "cache"), str(source)]
        both = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in both:
            assert process.stdout.readline() == "begins\n"
        time.sleep(0.05 + 0.03 * attempt)
        for process in both:
            process.kill()
            process.communicate()
        store = ArrayCache(tmp_path / "cache")
        for path in (tmp_path / "cache").rglob("*.array"):
            entry = store._open(path, [source])
            assert entry is not None
            assert np.array_equal(entry.array, right)
        rebuilt = store.get("image", "0000", [source], lambda: CacheEntry(right, (1000, 1000)))
        assert np.array_equal(rebuilt.array, right)
