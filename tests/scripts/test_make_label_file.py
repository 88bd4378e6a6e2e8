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


def test_labels_are_distributed_among_the_tasks_that_share_the_images(cli, tmp_path):
    path, label_tasks = tmp_path / "labels.json", ["semseg", "depth", "normals"]
    tasks = ["tasks=single_depth", f"data.label_tasks=[{','.join(label_tasks)}]"]
    written = cli("scripts/make_label_file.py", "--output", path, "data=rooms", "data.options.length=[12,1]", *tasks)
    assert written.code == 0, written.err
    assert written.out.startswith("12 images: semseg 4, depth 4, normals 4 (rule one, seed 0)")
    labels = json.loads(path.read_text())
    assert {name: frozenset(names) for name, names in labels.items()} == draw_label_assignment(
        list(labels), label_tasks, "one", 0
    )
