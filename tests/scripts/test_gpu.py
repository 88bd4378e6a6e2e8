"""The pieces of `make gpu`: planned, run, skipped, cut, failed; by stand-ins for the processes that measure."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from helpers.common import ROOT, assert_fails, choices

from mtcl import UserError
from mtcl.atomic import write_json

SCRIPT = "scripts/benchmarks/gpu.py"
FACTS = {"device_type": "cpu", "device": "cpu (x86_64, 1 threads)", "torch": "2.11", "commit": "abc"}
WRITE = "import json, pathlib, sys; pathlib.Path(sys.argv[-1]).write_text(json.dumps({'x': 1}))"
FAIL = "import sys; print('some lines'); print('error: no memory'); sys.exit(3)"
ENGINE = {
    "nyud_invpt_vit_base": {
        "batch": 8,
        "variants": {
            "standard": {"seconds": [4.0, 4.0], "step_mib": 1000.0, "roofline": None, "compiled": False},
            "default": {"seconds": [2.0, 2.0], "step_mib": 500.0, "roofline": None, "compiled": False},
            "compiled": {"seconds": [1.0, 1.0], "step_mib": 500.0, "roofline": 0.25, "compiled": True},
        },
    }
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


gpu = load_script()


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "POLL", 0.01)
    modules = dict.fromkeys((*gpu.REQUIRED, *gpu.OPTIONAL), True)
    lines: list[str] = []
    return gpu.Session(tmp_path / "out", tmp_path / "work", FACTS, modules, dict(os.environ), say=lines.append)


def make_piece(name, code, **options):
    return gpu.Piece(name, ("-S", "-c", code), **options)


def read(session, name):
    return json.loads((session.output / f"{name}.json").read_text())


# The plan


@pytest.mark.parametrize("tiny", [False, True])
def test_the_plan_names_scripts_and_experiments_that_exist(tiny):
    pieces = gpu.list_pieces(tiny, None)
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert {piece.group for piece in pieces} == {*gpu.SECTIONS, "study"}
    for piece in pieces:
        script, *arguments = piece.arguments
        assert script == "-m" or (ROOT / script).is_file()
        assert all((ROOT / one).is_file() for one in arguments if one.endswith((".py", ".yaml")))
        assert {*piece.needs, *piece.uses} <= set(gpu.OPTIONAL)
    assert set(gpu.ENGINE.values()) <= set(choices("experiment"))
    assert set(gpu.BACKBONES) <= set(choices("backbone"))
    assert set(gpu.DECODERS) <= set(choices("decoder"))
    assert "tests/metrics/test_metrics.py" in pieces[0].arguments
    assert pieces[-1].obstacle == ("" if tiny else "no study was chosen; give --study FILE")


def test_pieces_are_chosen_by_name_or_group():
    pieces = gpu.list_pieces(False, ROOT / "scripts" / "studies" / "smoke.yaml")
    chosen = gpu.choose_pieces(pieces, ["step", "engine_hrnet18"])
    assert [piece.name for piece in chosen] == ["engine_hrnet18", "step_mobilenetv2", "step_resnet50", "step_vit_base"]
    assert gpu.choose_pieces(pieces, []) == pieces
    with pytest.raises(UserError, match="--pieces motor is not known; choose among tests, determinism, engine_hrnet18"):
        gpu.choose_pieces(pieces, ["motor"])
    assert pieces[-1].command == "python scripts/study.py scripts/studies/smoke.yaml"
    with pytest.raises(UserError, match=r"--study none\.yaml does not exist"):
        gpu.list_pieces(False, Path("none.yaml"))


def test_a_study_elsewhere_is_recorded_without_its_folder(tmp_path):
    (tmp_path / "mine.yaml").touch()
    study = gpu.list_pieces(False, tmp_path / "mine.yaml")[-1]
    assert study.arguments == ("scripts/study.py", str(tmp_path / "mine.yaml"))
    assert study.command == "python scripts/study.py mine.yaml"


# The machine


def test_a_machine_without_a_card_or_a_module_is_refused():
    modules = dict.fromkeys(gpu.REQUIRED, True)
    gpu.check_machine({"modules": modules, "device": "NVIDIA H200"}, "cuda")
    gpu.check_machine({"modules": modules, "device": "cpu (x86_64)"}, "cpu")
    with pytest.raises(UserError, match="sees no CUDA device; --device cpu --tiny"):
        gpu.check_machine({"modules": modules, "device": "cpu (x86_64)"}, "cuda")
    with pytest.raises(UserError, match="not installed: hydra, omegaconf; see"):
        gpu.check_machine({"modules": modules | {"hydra": False, "omegaconf": False}}, "cuda")


def test_wheels_that_are_not_installed_are(tmp_path, monkeypatch):
    version = importlib.metadata.version("pytest")
    for name in (f"pytest-{version}-py3-none-any.whl", "not_a_package-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "", "ERROR: bad wheel")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.install_wheels(tmp_path, tmp_path / "packages") == ["not_a_package-1.0-py3-none-any.whl"]
    assert commands[0][-3:] == [
        "--target",
        str(tmp_path / "packages"),
        str(tmp_path / "not_a_package-1.0-py3-none-any.whl"),
    ]
    assert "--no-index" in commands[0]
    with pytest.raises(UserError, match="ERROR: bad wheel"):
        gpu.install_wheels(tmp_path, tmp_path / "packages")
    with pytest.raises(UserError, match=r"no file \*\.whl"):
        gpu.install_wheels(tmp_path / "packages", tmp_path)


def test_a_cpu_hides_the_cards_and_wheels_come_second(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    on_cuda, on_cpu = gpu.make_environment("cuda", tmp_path / "none"), gpu.make_environment("cpu", tmp_path)
    assert on_cuda["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]
    assert on_cpu["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path), "/elsewhere"]
    assert "CUDA_VISIBLE_DEVICES" not in on_cuda
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""


# Running


def test_a_failure_is_recorded_and_the_others_go_on(session):
    pieces = [
        make_piece("bad", FAIL),
        make_piece("silent", ""),
        make_piece("absent", WRITE, needs=("pytest",), uses=("onnx",)),
        make_piece("good", WRITE, uses=("onnx",)),
    ]
    session.modules.update(pytest=False, onnx=False)
    records = gpu.run_pieces(pieces, session, None)
    assert [record["status"] for record in records] == ["failed", "failed", "skipped", "finished"]
    assert records == [read(session, piece.name) for piece in pieces]
    bad, silent, absent, good = records
    assert (bad["returncode"], bad["reason"]) == (3, "exit code 3: error: no memory")
    assert bad["last_lines"] == ["some lines", "error: no memory"]
    assert silent["reason"] == "it wrote no numbers"
    assert (absent["reason"], absent["missing_modules"]) == ("not installed: pytest", ["pytest", "onnx"])
    assert (good["result"], good["missing_modules"]) == ({"x": 1}, ["onnx"])
    assert good.items() >= FACTS.items()
    assert isinstance(good["seconds"], float)  # rounded: 0.0 for so short a command
    assert good["command"].startswith("python -S -c ")


def test_a_finished_piece_is_skipped_and_others_are_done_again(session):
    piece = make_piece("one", WRITE)
    path = session.output / "one.json"
    finished = {"status": "finished", "command": piece.command, "device_type": "cpu", "result": "earlier"}
    for change, is_kept in [
        ({}, True),
        ({"status": "failed"}, False),
        ({"status": "started"}, False),  # its process was killed together with this one
        ({"command": "python other.py"}, False),
        ({"device_type": "cuda"}, False),
    ]:
        write_json(path, finished | change)
        (record,) = gpu.run_pieces([piece], session, None)
        assert (record["result"] == "earlier") == is_kept, change
        assert record["status"] == "finished"
    path.write_text("{")
    assert gpu.run_pieces([piece], session, None)[0]["result"] == {"x": 1}


def test_a_piece_past_its_limit_fails(session):
    slow = replace(session, time_limit=0.2)
    (record,) = gpu.run_pieces([make_piece("slow", "import time; time.sleep(60)")], slow, None)
    assert (record["status"], record["reason"]) == ("failed", "it ran past its limit of 0 s")


def test_a_piece_ends_with_its_children(session, tmp_path):
    file = tmp_path / "child"
    code = (
        "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; "
        f"time.sleep(60)']); open('{file}.new', 'w').write(str(child.pid)); os.rename('{file}.new', '{file}'); "
        "time.sleep(60)"
    )
    signals: list[int] = []

    def stop_once_it_runs():
        while not file.exists():
            time.sleep(0.01)
        signals.append(signal.SIGTERM)

    threading.Thread(target=stop_once_it_runs, daemon=True).start()
    assert gpu.run_piece(make_piece("slow", code), session, 60, signals)["status"] == "unfinished"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(int(file.read_text())):
        time.sleep(0.01)
    assert not is_running(int(file.read_text()))


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


def test_a_study_runs_in_slices(session):
    """The stand-in for study.py ends with 75 twice, as for a time limit, then it writes the table."""
    folder = session.work / "study"
    code = (
        f"import pathlib, sys; folder = pathlib.Path({str(folder)!r}); folder.mkdir(parents=True, exist_ok=True); "
        "calls = folder / 'calls'; text = calls.read_text() if calls.exists() else ''; "
        "calls.write_text(text + ' '.join(sys.argv[1:]) + '\\n'); "
        "(folder / 'study.md').write_text('a table'); (folder / 'study.json').write_text('{\"rows\": 1}'); "
        "sys.exit(75 if text.count('\\n') < 2 else 0)"
    )
    chosen = replace(session, study_arguments=("--jobs=2", "data.root=/data"), time_limit=300)
    (record,) = gpu.run_pieces([make_piece("study", code)], chosen, None)
    assert (record["status"], record["result"]) == ("finished", {"table": "a table", "rows": 1})
    calls = (folder / "calls").read_text().splitlines()
    assert calls == [f"--jobs=2 data.root=/data --output {folder} --time-limit=240"] * 3
    assert [line for line in session.say.__self__ if "unfinished" in line]


def test_stop_after_leaves_the_rest_to_the_next_command(session):
    pieces = [make_piece("one", WRITE), make_piece("two", WRITE)]
    records = gpu.run_pieces(pieces, session, 20.0)
    assert [record["status"] for record in records] == ["finished", "unfinished"]
    assert not (session.output / "two.json").exists()
    slow = make_piece("slow", "import time; time.sleep(60)")
    (record,) = gpu.run_pieces([slow, *pieces], session, 0.2)
    assert record["status"] == "unfinished"
    assert read(session, "slow")["reason"] == "it was ended; the same command goes on"


def test_a_signal_ends_the_piece(session):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        gpu.run_pieces([make_piece("slow", "import time; time.sleep(60)")], session, None)
    assert read(session, "slow")["status"] == "unfinished"


def test_tests_are_counted_from_their_report(tmp_path):
    report = '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/>'
    report += '</testcase><testcase classname="a" name="d"><failure/></testcase></testsuite></testsuites>'
    (tmp_path / "r.xml").write_text(report)
    assert gpu.count_tests(tmp_path / "r.xml") == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a.d"]}


# The table


def test_the_tables_compare_with_the_targets():
    pieces = gpu.list_pieces(False, None)
    step = {"step": 2.0, "weighing": 0.9, "memory": 1.9}
    latency = {"decoder": "invpt", "batch": 1}
    results = {
        "engine_vit_base": ENGINE,
        "step_resnet50": {"as given": {"percent added": step}},
        "step_vit_base": {"as given": {"percent added": step | {"weighing": 1.1}, "profile": {"waits": "none"}}},
        "data": {"cached": 51.4, "waiting": 0.031},
        "features_vit_small": {
            "a": {
                "bytes_per_view": 3,
                "frozen": {"seconds": 0.1, "images_per_second": 80.0, "waiting": 0.5, "step_mib": 7.0, "gain": 1.5},
            }
        },
        "inference_invpt": {
            "left_out": {"tensorrt": "this onnxruntime has no TensorrtExecutionProvider"},
            "rows": [
                {**latency, "backend": "eager", "ms": 5.0, "images_per_s": 200.0, "memory_mib": 90.0},
                {**latency, "backend": "onnx", "ms": None, "memory_mib": None, "error": "not enough memory"},
                {**latency, "backend": "regulariser", "off_ms": 5.0, "on_ms": 5.125, "identical": True},
            ],
        },
        "determinism": {
            "x": {"steps": 10, "losses_equal": True, "different_weights": 0},
            "y": {"steps": 10, "error": "exit code 1"},
        },
        "tests": {"passed": 8, "failed": 0, "skipped": 1},
        "study": {"table": "| variant |\n|---|"},
    }
    records = {
        name: {**FACTS, "status": "finished", "seconds": 61.2, "result": result} for name, result in results.items()
    }
    records["engine_hrnet18"] = {"status": "failed", "seconds": 3.0, "reason": "exit code 1: a | b"}
    text = gpu.format_report(pieces, records, False)
    for line in (
        "device: cpu (x86_64, 1 threads)",
        "| engine_hrnet18 | failed | 3 | exit code 1: a / b |",
        "| engine_vit_large | to do | - | - |",
        "| nyud_invpt_vit_base standard | 2.00 | 1.00 | 1000 | 1.00 | - | - |",
        "| nyud_invpt_vit_base default | 4.00 | 2.00 | 500 | 0.50 | - | no |",
        "| nyud_invpt_vit_base compiled | 8.00 | 4.00 | 500 | 0.50 | 25.0 % | yes |",
        "| resnet50 | 2.0 | 0.9 | 1.9 | yes | - |",
        "| vit_base | 2.0 | 1.1 | 1.9 | no | none |",
        "| waiting | 3.1 % of a step |",
        "| a, frozen | 100.0 | 80.0 | 50.0 % | 7 | 1.50 |",
        "| invpt, eager | 1 | 5.00 | 200.0 | 90 |",
        "| invpt, onnx (not enough memory) | 1 | - | - | - |",
        "| invpt, with the regulariser | 1 | 5.12 | - | - |",
        "| tensorrt: this onnxruntime has no TensorrtExecutionProvider | - | - | - | - |",
        "| x | 10 | yes | 0 |",
        "| y | 10 | exit code 1 | - |",
        "| tests for a card | 8 | 0 | 1 |",
        "| variant |",
    ):
        assert line in text.splitlines(), line
    assert gpu.format_report(pieces, {}, True).startswith("# A rehearsal")


# The command


def test_list_shows_what_is_to_do(cli, tmp_path):
    (piece,) = gpu.choose_pieces(gpu.list_pieces(True, None), ["data"])
    write_json(tmp_path / "data.json", {"status": "finished", "command": piece.command, "device_type": "cpu"})
    arguments = ["--list", "--tiny", f"--output={tmp_path}", "--pieces", "data", "step_resnet50"]
    lines = cli(SCRIPT, *arguments, "--device=cpu").out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step_resnet50", "to"], ["data", "finished"]]
    assert cli(SCRIPT, *arguments).out.splitlines()[1].split()[1] == "to"  # on a card it is not
    assert_fails(cli(SCRIPT, "resnet18"), "resnet18 is not an override key=value")


@pytest.mark.slow
def test_two_pieces_as_processes(cli, tmp_path):
    arguments = ["--device=cpu", "--tiny", f"--output={tmp_path / 'out'}", f"--work={tmp_path / 'work'}"]
    arguments += ["--pieces", "step_mobilenetv2", "inference_multi_head"]
    result = cli(SCRIPT, *arguments)
    assert result.code == 0, result.err
    step, latency = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in arguments[-2:])
    assert step["result"]["as given"]["percent added"].keys() >= {"step", "weighing", "memory"}
    assert latency["result"]["rows"][0]["ms"] > 0
    assert step["torch"]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| multi_head, eager | 1 |" in text
    assert "| mobilenetv2 |" in text
    assert "<" not in text
    again = cli(SCRIPT, *arguments)
    assert again.out.count("finished before") == 2
