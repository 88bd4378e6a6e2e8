"""How commands read their words, write to a terminal or a pipe, and end."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.common import ROOT, TINY, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mtcl.cli import terminal
from mtcl.cli.arguments import output_path
from mtcl.cli.hydra_app import run_hydra_app
from mtcl.cli.script import run
from mtcl.cli.terminal import EscapingFormatter, ToleratingStream, tolerate_closed_output
from mtcl.config.overrides import add_checkpoint_key, expand_home, quote_paths
from mtcl.config.quoting import expand_tilde, quote_value
from mtcl.errors import Preempted
from mtcl.training.preemption import PreemptionHandler
from mtcl.training.run_logger import RunLogger

# One of a run's words and what Hydra is to make of its value.
VALUES = [
    ("data.root=/a=b", "/a=b"),
    ("data.root=~/nyu", "/home of mine/nyu"),
    ("++data.cache=~", "/home of mine"),
    ('hydra.run.dir="~/x"', "/home of mine/x"),
    ("resume='~/x'", "/home of mine/x"),
    ("checkpoint=/runs [1] {2} #3/a,b", "/runs [1] {2} #3/a,b"),
    ("save_predictions=/дан/für", "/дан/für"),
    ("predictions=2024", "2024"),
    ("name=true", "true"),
    ("data.label_assignment=it's", "it's"),
    ("backbone.weights=a\\b=c", "a\\b=c"),
    ("decoder.weights=/w=0.1/last.pt", "/w=0.1/last.pt"),
    ("data.root=/a\\", "/a\\"),
    ("data.cache=null", None),
    ("resume=auto", "auto"),
    ("data.root=${oc.env:X}/a=b", "${oc.env:X}/a=b"),
    ('data.root="/a=b"', "/a=b"),
    ("trainer.max_steps=3", 3),
]


def value_of(word):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize(("word", "value"), VALUES)
def test_a_path_is_read_as_it_is_typed(monkeypatch, word, value):
    monkeypatch.setenv("HOME", "/home of mine")
    (typed,) = quote_paths([word])
    assert value_of(typed) == value
    assert quote_paths([typed]) == [typed], "once is enough"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_path_goes_through_hydra_unchanged(text):
    folder = f"/{text}/x"
    assert value_of(f"data.root={quote_value(folder)}") == folder
    assert value_of(*quote_paths([f"data.root={folder}"])) in (folder, folder.replace("\\\\", "\\"), folder.strip())


def test_a_comma_separates_the_values_of_a_sweep(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    (word,) = quote_paths(["data.root=~/a,~/b=c,/d"], sweeps=True)
    sweep = OverridesParser.create().parse_override(word)
    assert [str(value) for value in sweep.sweep_string_iterator()] == ["/h/a", "'/h/b=c'", "/d"]
    assert quote_paths(["resume=a,b", "data.root=choice(a,b)"], sweeps=True) == ["resume=a,b", "data.root=choice(a,b)"]


def test_a_homes_sign_is_replaced_in_every_script(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["~/a", "--out=~/b", "input='~/c'", "~data.limit", "x=a~", "~", "--cfg", "y=~nobody-here/z"]
    expected = [f"{tmp_path}/a", f"--out={tmp_path}/b", f"input='{tmp_path}/c'", "~data.limit", "x=a~"]
    assert [expand_tilde(word) for word in arguments] == [*expected, str(tmp_path), "--cfg", "y=~nobody-here/z"]
    assert output_path("~/o") == tmp_path / "o"
    expanded = []
    monkeypatch.setattr(sys, "argv", ["predict.py", "--input=~/a b"])
    run(lambda: expanded.extend(sys.argv[1:]))
    assert expanded == [f"--input={tmp_path}/a b"]


def test_paths_of_yaml_files_have_the_home_folder_too(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = composed("data=nyud", "decoder=sak", "backbone=vit_small")
    config.data.root, config.decoder.weights = "~/nyu", "~/last.pt"
    expand_home(config)
    assert (config.data.root, config.decoder.weights) == (f"{tmp_path}/nyu", f"{tmp_path}/last.pt")
    assert config.data.cache == "data/cache"
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nname: ~/mine=1\nhydra: {run: {dir: '~/run'}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    result = cli("train.py", *TINY, "--config-dir=~", "+experiment=mine", "trainer.max_steps=0")
    assert "trainer.max_steps=0" in result.err
    assert not Path("~").exists()


def test_the_first_bare_path_is_the_checkpoint(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert add_checkpoint_key(["seed=1", f"{tmp_path}/a=b"]) == ["seed=1", f"checkpoint='{tmp_path}/a=b'"]
    assert add_checkpoint_key(["none.pt"]) == ["checkpoint=none.pt"]
    for arguments in (["seed=1", "data.root=a/b"], ["--config-dir", str(tmp_path)], ["~data.limit"], ["-m"]):
        assert add_checkpoint_key(arguments) == arguments


# --- What is written


@pytest.fixture(autouse=True)
def handlers():
    """Hydra's, which write to a test's streams, are gone after it."""
    root = logging.getLogger()
    handlers_before = root.handlers[:]
    yield
    root.handlers = handlers_before


class Broken:
    """A stream whose reader is gone."""

    def __init__(self, number, terminal=False):
        self.number, self.terminal, self.tries = number, terminal, 0

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))

    flush = fileno = lambda self: self.write("")


def test_a_reader_that_goes_ends_nothing_and_a_full_disk_is_told(capfd):
    for stream in (Broken(errno.EPIPE), Broken(errno.EIO, terminal=True)):
        assert ToleratingStream(stream).write("four") == 4
        ToleratingStream(stream).flush()
        assert stream.tries
    for stream in (Broken(errno.ENOSPC), Broken(errno.EIO)):
        with pytest.raises(OSError, match=os.strerror(stream.number)):
            ToleratingStream(stream).write("text")
    assert ToleratingStream(Broken(errno.ENOSPC), extra_errors=terminal.DISK_FULL_ERRORS).write("text") == 4
    with tolerate_closed_output():
        print("seen", file=sys.stderr)
    assert capfd.readouterr().err == "seen\n"


def test_names_do_not_steer_the_terminal(capsys, monkeypatch):
    from mtcl import UserError

    def fails():
        raise UserError("a\x1b[31m\n\u202eb für")

    with pytest.raises(SystemExit):
        run(fails)
    assert capsys.readouterr().err == "error: a\\x1b[31m\\n\\u202eb für\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "a\x1b[31m=1"])
    with pytest.raises(SystemExit):
        run_hydra_app(lambda config: None, ROOT / "configs", "train")
    output = capsys.readouterr().err
    assert "\\x1b[31m" in output
    assert "\x1b" not in output
    record = logging.LogRecord("n", logging.INFO, "f", 1, "a table:\n%s", ("b\x1b]0;c\x07",), None)
    assert EscapingFormatter("[%(message)s]").format(record) == "[a table:\nb\\x1b]0;c\\x07]"
    formatter = OmegaConf.load(ROOT / "configs" / "train.yaml").hydra.job_logging.formatters.simple
    assert formatter["class"] == "mtcl.cli.terminal.EscapingFormatter"


def test_a_run_told_to_make_room_ends_with_one_line(capsys, monkeypatch, tmp_path):
    def job(config):
        raise Preempted(7)

    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as ending:
        run_hydra_app(job, ROOT / "configs", "train")
    assert ending.value.code == 75
    message = "stopped at step 7, its state is saved; the same command with resume=auto goes on from there\n"
    assert capsys.readouterr().err == message


def test_a_closed_terminal_is_a_signal_to_save_unless_it_is_ignored():
    handler_before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = PreemptionHandler()
        with stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.should_stop(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        stop = PreemptionHandler()
        with stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.should_stop(1)
    finally:
        signal.signal(signal.SIGHUP, handler_before)


def test_text_is_utf8_in_every_locale():
    """No text file is opened in the locale's encoding."""
    opened = re.compile(r"\.(read_text|write_text)\((?!.*utf-8)|\.open\((\"[arw]\")?\)")
    allowed = ('".lock").open(', 'file = path.open("w")', "logger.open()")  # no text files
    lines = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("mtcl", "scripts")
        for file in (ROOT / folder).rglob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if opened.search(line) and not any(word in line for word in allowed)
    ]
    assert lines == []


def test_curves_that_cannot_be_written_are_a_warning(monkeypatch, tmp_path, caplog):
    def refuses(folder, purge_step=None):
        raise UnicodeEncodeError("utf-8", "\udcc3", 0, 1, "surrogates not allowed")

    monkeypatch.setattr("mtcl.training.loggers.tensorboard_logger._summary_writer", refuses)
    run_logger = RunLogger(tmp_path)
    run_logger.log_scalars(1, "train", {"depth": 2.0})
    run_logger.log_scalars(2, "train", {"depth": 1.0})
    run_logger.close()
    assert caplog.text.count("TensorBoard's curves are not written") == 1
    assert len((tmp_path / "log.jsonl").read_text("utf-8").splitlines()) == 2


# --- Whole processes

ENDLESS = ["trainer.max_steps=100000", "trainer.val_interval=null", "trainer.checkpoint_interval=null"]
QUICK = [
    *TINY,
    "trainer.num_panels=0",
    "trainer.validate_first=false",
    "evaluation.score_boundaries=false",
    "tasks.names=[depth]",
]


@pytest.mark.slow
def test_without_a_reader_and_in_an_ascii_locale_a_run_is_whole(tmp_path):
    folder = tmp_path / "für 深度"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train.py", *QUICK, "trainer.max_steps=1", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, close_fds=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # | head -1
    assert process.wait(120) == 0
    assert {"metrics.json", "run.json", "train.log"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("events.*"))
    with open("/dev/full", "w") as full:
        completed = subprocess.run(
            [sys.executable, "scripts/runs.py", folder], cwd=ROOT, stdout=full, stderr=-1, text=True
        )
    assert completed.returncode == 1
    assert completed.stderr.startswith("error: the output: No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_says_only_that_it_saved(tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *QUICK, *ENDLESS, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup SIGHUP is ignored, and so inherited
    )
    try:
        deadline = time.monotonic() + 100
        while not (folder / "log.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    finally:
        process.kill()  # it would train on after a failure
    assert process.returncode == 75
    lines = [line for line in output.replace("\r", "\n").splitlines() if line and not line.startswith("train:")]
    lines = [line for line in lines if line != "loading PyTorch, which can take a few seconds"]
    assert len(lines) == 1, output
    assert "its state is saved" in lines[0]
    assert (folder / "checkpoints" / "last.pt").is_file()
