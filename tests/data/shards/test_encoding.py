"""Files of a sample in a shard: without loss, and damaged ones are one sentence."""

import io

import numpy as np
import pytest

from mtcl import UserError
from mtcl.data import Sample
from mtcl.data.shards.encoding import decode_npz, decode_sample, encode_sample

RNG = np.random.default_rng(0)
SAMPLE = Sample(
    "a",
    RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8),
    {
        "semseg": RNG.integers(0, 256, (12, 9), dtype=np.uint8),
        "normals": RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8),
        "depth": RNG.uniform(0, 9, (12, 9)).astype(np.float32),
    },
)
VECTORS = SAMPLE._replace(labels={"normals": RNG.normal(size=(12, 9, 3)).astype(np.float32)})


@pytest.mark.parametrize("sample", [SAMPLE, VECTORS])
def test_a_sample_is_read_as_it_was_written(sample):
    decoded = decode_sample("a", encode_sample(sample), list(sample.labels), "s.tar")
    assert decoded.id == "a"
    np.testing.assert_array_equal(decoded.image, sample.image, strict=True)
    for name, label in sample.labels.items():
        np.testing.assert_array_equal(decoded.labels[name], label, strict=True)


def test_only_the_labels_in_use_are_decoded():
    members = encode_sample(SAMPLE) | {"depth.npz": b"damaged"}
    assert list(decode_sample("a", members, ["semseg"], "s.tar").labels) == ["semseg"]


def save(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"semseg.png": None}, r"s\.tar has no label semseg of a; make this shard anew"),
        ({"image.png": None}, r"s\.tar has no image of a"),
        ({"semseg.png": b"\x89PNG"}, r"a\.semseg\.png in s\.tar is not a readable image"),
        ({"depth.npz": encode_sample(SAMPLE)["depth.npz"][:-30]}, r"a\.depth\.npz in s\.tar is not a readable \.npz"),
        ({"depth.npz": save(other=np.ones(3))}, r"a\.depth\.npz in s\.tar is not a readable"),
        ({"depth.npz": save(array=np.ones((12, 9)))}, r"a\.depth\.npz in s\.tar holds float64, .* float32"),
        ({"depth.npz": save(array=np.ones((3, 4), np.float32))}, r"a\.depth\.npz in s\.tar is an array \(3, 4\) for"),
    ],
)
def test_a_faulty_file_is_one_sentence(changes, sentence):
    members = {name: data for name, data in (encode_sample(SAMPLE) | changes).items() if data is not None}
    with pytest.raises(UserError, match=sentence):
        decode_sample("a", members, ["semseg", "depth"], "s.tar")


def test_an_array_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr("mtcl.data.shards.encoding.MAX_BYTES", 100)
    with pytest.raises(UserError, match="unpacks to more than the 100 bytes"):
        decode_npz("a.depth.npz", save(array=np.ones(30, np.float32)))
