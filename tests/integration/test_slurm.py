"""On a real Slurm, of two nodes on this machine: what is submitted, preempted, requeued, and what a dead node costs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from helpers.common import ROOT, TINY, composed
from helpers.run_folders import assert_same_run

from mtcl.cli.train import train
from mtcl.launch.study import run_study
from mtcl.launch.study_slurm import submit_study

SCRIPTS = ROOT / "scripts" / "slurm"
PATIENCE = 900  # seconds
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None,
        reason="Slurm is not installed here (apt-get install slurm-wlm munge)",
    ),
]

NUM_STEPS = 400  # they take some 20 s on two cores: signals come in the middle
OVERRIDES = [*TINY, "tasks.names=[semseg,depth]", "trainer.validate_first=false"]
OVERRIDES += ["trainer.val_interval=null", "trainer.num_panels=0", "evaluation.score_boundaries=false", "data.limit=7"]
OVERRIDES += [f"trainer.max_steps={NUM_STEPS}", "trainer.checkpoint_interval=10"]


class Cluster:
    """The commands of a Slurm whose configuration is in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manage(self, command: str) -> None:
        """Start, or start again what has died; or stop."""
        subprocess.run([ROOT / "scripts/dev/slurm.sh", command, self.folder], check=True, timeout=100)

    def submit(self, *arguments: object) -> str:
        """The number of the job, or of the array."""
        return self.ask("sbatch", "--parsable", f"--output={self.folder}/%A_%a.out", *arguments)

    def ask(self, *arguments: object) -> str:
        command = [str(word) for word in arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def look(self, job: str) -> list[list[str]]:
        """State, reason, node and number of a job, or of each element of an array."""
        lines = self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--array", "-o", "%T %r %N %i")
        return [line.split() for line in lines.splitlines()]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.ask("scontrol", "show", "jobs") + self.outputs()
            time.sleep(0.1)

    def start_again(self, number: str) -> None:
        """Start a requeued job, which would rest two minutes; not in the second of its end, when its key is revoked."""
        time.sleep(2)
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait_to_complete(self, job: str) -> None:

        def ended() -> bool:
            states = self.look(job)
            for state, reason, *_, number in states:
                assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), self.outputs()
                if reason == "BeginTime":
                    self.start_again(number)
            return all(state == "COMPLETED" for state, *_ in states)

        self.wait_for(ended)

    def lose_the_node_of(self, job: str) -> None:
        """Kill all that runs there, as when the power goes."""
        ((_, _, node, _),) = self.look(job)
        processes = [int(line.split()[0]) for line in self.ask("scontrol", "listpids", job, node).splitlines()[1:]]
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes}
        stepds = {pid for pid in parents if Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")}
        for pid in (int((self.folder / "run" / f"{node}.pid").read_text()), *stepds, *processes):
            os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: self.look(job)[0][0] == "PENDING")

    def read_output(self, job: str) -> str:
        """All that the job has printed, without the lines of the progress bar."""
        return "\n".join(
            line
            for path in sorted(self.folder.glob(f"{job}_*.out"))
            for line in path.read_text().splitlines()
            if "it/s" not in line
        )

    def outputs(self) -> str:
        """The end of what each job has printed, for the message of a test that fails."""
        jobs = sorted({path.name.partition("_")[0] for path in self.folder.glob("*.out")}, key=int)
        return "".join(f"\njob {job}:\n{self.read_output(job)[-6000:]}" for job in jobs)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.gettempdir()) / f"slurm-of-tests-{os.getpid()}"  # paths of sockets have to be short
    cluster = Cluster(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        try:
            cluster.manage("start")
            yield cluster
        finally:
            cluster.manage("stop")
            shutil.rmtree(folder)


def steps(folder: Path) -> int:
    """Count the steps that a run has taken."""
    log = folder / "log.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def test_a_run_outlives_preemption_and_a_dead_node_bit_for_bit(cluster, tmp_path):
    train(composed(*OVERRIDES), tmp_path / "uncut")
    run = tmp_path / "run"
    job = cluster.submit("--gpus-per-node=0", SCRIPTS / "one_gpu.sh", *OVERRIDES, f"hydra.run.dir={run}")
    cluster.wait_for(lambda: steps(run) > 2)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.wait_for(lambda: cluster.look(job)[0][:2] == ["PENDING", "BeginTime"])
    num_steps = steps(run)
    assert 2 < num_steps < NUM_STEPS
    cluster.start_again(job)
    cluster.wait_for(lambda: steps(run) > num_steps)
    cluster.lose_the_node_of(job)
    assert steps(run) < NUM_STEPS
    cluster.wait_to_complete(job)
    cluster.manage("start")
    output = cluster.read_output(job)
    assert f"stopped at step {num_steps}, its state is saved" in output
    assert output.count("resumed at step") == 2
    assert "Restarts=2 " in cluster.ask("scontrol", "show", "job", job)
    assert_same_run(tmp_path / "uncut", run)


def test_a_job_that_is_cancelled_saves_and_is_not_requeued(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit("--gpus-per-node=0", SCRIPTS / "one_gpu.sh", *OVERRIDES, f"hydra.run.dir={run}")
    cluster.wait_for(lambda: steps(run) > 0)
    cluster.ask("scancel", job)
    cluster.wait_for(lambda: cluster.look(job)[0][0] == "CANCELLED")
    cluster.wait_for(lambda: "its state is saved" in cluster.read_output(job))
    assert cluster.look(job)[0][0] == "CANCELLED"


def test_a_sweep_as_jobs_of_which_one_is_preempted(cluster, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = [*OVERRIDES, "seed=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=20"]
    command = [sys.executable, "train.py", "-m", *overrides, f"hydra.sweep.dir={tmp_path}/sweep"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as sweep:
        cluster.wait_for(lambda: sum(steps(path.parent) > 0 for path in tmp_path.glob("sweep/*/log.jsonl")) == 2)
        first = cluster.ask("squeue", "--noheader", "--states=RUNNING", "--format=%i").splitlines()[-1]
        cluster.ask("scancel", "--signal=USR2", first)
        cluster.wait_for(lambda: cluster.look(first)[0][1] == "BeginTime")
        cluster.start_again(first)
        _, errors = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, errors
    assert "sweep of 2 runs: 2 finished" in errors.splitlines()
    logs = [path.read_text() for path in tmp_path.glob("sweep/*.log")]
    assert sorted(log.count("resumed at step") for log in logs) == [0, 1]
    assert sorted(log.count("its state is saved") for log in logs) == [0, 1]


def test_a_study_as_an_array(cluster, tmp_path):
    study, output = tmp_path / "study.yaml", tmp_path / "out"
    variants = {"off": {"overrides": ["regularizer=none"]}, "on": {"overrides": [], "against": "off"}}
    study.write_text(json.dumps({"overrides": OVERRIDES, "seeds": [0], "variants": variants}))
    lines: list[str] = []
    options = {"root": ROOT, "list_tasks": lambda _: ["semseg", "depth"], "say": lines.append}
    batch_file = tmp_path / "mine.sh"
    text = (SCRIPTS / "study.sh").read_text()
    batch_file.write_text(text.replace("--output=slurm-", f"--output={cluster.folder}/"))
    submit_study(study, output, batch_file=batch_file, **options)
    array = re.search(r"2 of 2 runs submitted as the array (\d+)", lines[0])[1]
    cluster.wait_for(lambda: steps(output / "on" / "seed_0") > 0)
    cluster.ask("scancel", "--signal=USR1", f"{array}_1")
    cluster.wait_to_complete(array)
    assert "resumed at step" in (output / "on" / "seed_0.log").read_text()
    assert "resumed at step" not in (output / "off" / "seed_0.log").read_text(), "only on was told to save"
    assert run_study(study, output, command=[], table_only=True, **options) == []
    assert list(json.loads((output / "study.json").read_text())["rows"]) == ["off", "on"]


def test_several_nodes_save_together_and_go_on(cluster, tmp_path):
    run = tmp_path / "run"
    overrides = [*OVERRIDES, "data.batch_size=2", f"hydra.run.dir={run}"]
    job = cluster.submit("--gpus-per-node=1", "--cpus-per-task=2", SCRIPTS / "several_nodes.sh", *overrides)
    cluster.wait_for(lambda: steps(run) > 2)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as --signal=B: does when the time is almost over
    cluster.wait_for(lambda: cluster.look(job)[0][:2] == ["PENDING", "BeginTime"])
    num_steps = steps(run)
    assert num_steps % 10 == 0, "they exchange signals every ten steps"
    assert 0 < num_steps < NUM_STEPS
    cluster.wait_to_complete(job)
    assert f"resumed at step {num_steps}" in cluster.read_output(job)
    assert json.loads((run / "run.json").read_text())["processes"] == 2


def test_workers_of_a_search_share_one_storage(cluster, tmp_path):
    search = tmp_path / "search.yaml"
    overrides = [*OVERRIDES, "trainer.max_steps=2"]
    space = {"loss.weights.depth": {"low": 0.5, "high": 2}}
    settings = {"name": "shared", "overrides": overrides, "space": space, "objective": "depth/rmse", "trials": 4}
    search.write_text(json.dumps(settings))
    command = f"srun python scripts/search.py {search} --output {tmp_path}/out"
    array = cluster.submit("--array=0-1", f"--wrap={command}")
    cluster.wait_to_complete(array)
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/out/search.db")
    assert study.n_trials == 4
    outputs = [(cluster.folder / f"{array}_{i}.out").read_text() for i in range(2)]
    starts = [re.findall(r"\] (trial_\d+): ", output) for output in outputs]
    assert all(starts), "both have worked"
    assert sorted(starts[0] + starts[1]) == [f"trial_{number:04d}" for number in range(4)]
