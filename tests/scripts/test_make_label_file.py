"""The file of a command is what data.label_assignment=one would draw, and no file is overwritten."""

import json

from helpers.common import assert_fails

from mtcl.data.partial_labels import draw_label_assignment, read_label_assignment
from mtcl.tasks import TASK_NAMES


def test_a_file_of_labels(cli, tmp_path):
    path = tmp_path / "labels.json"
    command = ("scripts/make_label_file.py", "--output", path, "--seed", 5, "data=rooms", "data.options.length=[13,1]")
    written = cli(*command)
    assert written.code == 0, written.err
    lines = written.out.splitlines()
    assert lines[0].startswith("13 images: semseg ")
    assert sorted(int(part.rstrip(",")) for part in lines[0].split(" (")[0].split()[3::2]) == [2, 2, 2, 2, 2, 3]
    assert lines[-1].endswith(f"data.label_assignment={path}")
    ids = list(json.loads(path.read_text()))
    assert read_label_assignment(path, ids, TASK_NAMES) == draw_label_assignment(ids, TASK_NAMES, "one", 5)
    assert_fails(cli(*command), "labels.json exists")
