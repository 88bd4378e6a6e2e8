"""Small files of strangers: any problem is one sentence, quickly."""

import time

import pytest

from mtcl.errors import UserError
from mtcl.safe_files import MAX_DEPTH, check_depth, read_json, read_yaml

YAML = {
    "sequences in one line": "- " * 50_000 + "a",
    "sequences with wide gaps": "-  " * 50_000 + "a",
    "brackets": "[" * 50_000,
    "braces": "{a: " * 50_000,
    "indented": "\n".join(" " * depth + "a:" for depth in range(500)),
    "question marks": "? " * 5_000,
    "aliases": "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]",
    "number to base 60": "a: 1" + ":1" * 200_000,
    "fraction to base 60": "a: 1" + ":0" * 200 + ".5",
    "many digits": "a: " + "9" * 5_000,
    "date": "!!timestamp foo",
    "truth": "!!bool foo",
    "no number": "!!int ''",
    "object": "!!python/object/apply:os.getpid []",
    "megabytes": "a: 1\n" * 500_000,
    "tab": "a:\n\t- b",
}
JSON = {
    "lists": "[" * 100_000,
    "deep": "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "many digits": "9" * 400,
    "very many digits": "-" + "9" * 10_000,
    "half": '{"a": 1',
    "nothing": "",
    "not UTF-8": b"\xff\xfe{}",
    "zeros": "\0" * 100,
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_of_a_stranger(case, tmp_path):
    (tmp_path / "a.yaml").write_text(YAML[case])
    original = time.monotonic()
    with pytest.raises(UserError, match=r"a\.yaml") as error:
        read_yaml(tmp_path / "a.yaml")
    assert time.monotonic() - original < 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", JSON)
def test_json_of_a_stranger(case, tmp_path):
    content = JSON[case]
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_what_is_counted_as_often_as_it_occurs(tmp_path):
    """Few objects, many paths to them: a walk would take for ever."""
    nest: list = [0] * 1000
    for _ in range(3):
        nest = [nest] * 1000
    with pytest.raises(UserError, match="more than 2,000,000 values"):
        check_depth(nest, "x")


def test_ordinary_files_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1, 2.5, 1e-3, text, null, true, 2001-01-01]\nb: {c: 'x: 1:1'}\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": [1, 2.5, 1e-3, "text", None, True, "2001-01-01"],
        "b": {"c": "x: 1:1"},
    }
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, NaN, "für"]}')
    assert read_json(tmp_path / "a.json")["a"][3] == "für"
