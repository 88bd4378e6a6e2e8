"""The record of a run."""

import hashlib

from mtcl.cli.run_record import record_labels
from mtcl.data import Rooms, apply_label_assignment
from mtcl.data.partial_labels import draw_label_assignment, write_label_assignment
from mtcl.tasks import TASK_NAMES, build_task


def test_the_record_says_where_the_labels_come_from(tmp_path):
    reader = Rooms("train", TASK_NAMES, size=(32, 40), length=(24, 1))
    options = Rooms.task_options()
    tasks = {name: build_task(name, **options[name]) for name in TASK_NAMES}
    counts = dict.fromkeys(tasks, 4)
    drawn = apply_label_assignment(reader, tasks, "one", seed=3)
    assert record_labels(drawn) == {"labels": {"rule": "one", "seed": 3, "images": counts}}
    path = tmp_path / "labels.json"
    write_label_assignment(path, draw_label_assignment(reader.ids, list(tasks), "one", 3), reader.ids, list(tasks))
    read = apply_label_assignment(reader, tasks, str(path), seed=0)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record_labels(read) == {"labels": {"file": "labels.json", "sha256": digest, "images": counts}}
    assert read.fingerprint() == drawn.fingerprint()
    assert record_labels(reader) == {}
    alone = apply_label_assignment(reader, {"depth": tasks["depth"]}, "one", seed=3, label_tasks=TASK_NAMES)
    record = {"rule": "one", "seed": 3, "tasks": list(TASK_NAMES), "images": {"depth": 4}}
    assert record_labels(alone) == {"labels": record}
