"""Run a study on Slurm: an array of jobs, one for each run that is not finished.

What each job asks the cluster for is in a batch file of the user's. An element of the array becomes the process that
trains, so that it gets Slurm's signals itself, and its exit code is that of the run.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mtcl.errors import UserError
from mtcl.launch.study import ListTasks, check_variants, choose_jobs, find_stored_results, plan_study, write_job


def submit_study(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    batch_file: Path,
    root: Path,
    list_tasks: ListTasks,
    num_parallel: int | None = None,
    only: Sequence[str] = (),
    results: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Submit the unfinished runs of a study as an array, and return at once.

    Args:
        path: The study's YAML file.
        output: The folder of runs and table.
        overrides: Overrides of every run, after the file's.
        batch_file: What ``sbatch`` runs, with the study, the folder and the overrides as its arguments.
        root: The folder that the jobs are started in.
        list_tasks: Returns the tasks of a run with these overrides; ``UserError`` if train.py would refuse them.
        num_parallel: Runs at once; None: as many as Slurm starts.
        only: The variants to run; empty: all.
        results: As for :func:`~mtcl.launch.study.run_study`: runs that have their results there are not submitted.
        say: Prints a line.

    Raises:
        UserError: A mistake in file or overrides, there is no Slurm here, or it refuses the jobs.
    """
    if not batch_file.is_file():
        raise UserError(f"--batch-file {batch_file}: there is no such file; copy scripts/slurm/study.sh.")
    path, output = path.resolve(), output.resolve()
    study, jobs = plan_study(path, output, overrides, list_tasks)
    stored = find_stored_results(results, study, jobs)
    chosen = [job for job in choose_jobs(path, study, jobs, only) if job.folder not in stored]
    check_variants(path, chosen, list_tasks)
    numbers = [n for n, job in enumerate(jobs) if job in chosen and not job.is_finished and not job.is_locked]
    if not numbers:
        say(f"{study.name}: nothing to submit, {len(chosen)} runs are finished or running")
        return
    if shutil.which("sbatch") is None:
        raise UserError("--launcher slurm: sbatch is not on this machine; go to one that submits jobs.")
    array = ",".join(map(str, numbers)) + (f"%{num_parallel}" if num_parallel else "")
    arguments = [str(path), "--output", str(output), *overrides]
    command = ["sbatch", "--parsable", f"--array={array}", str(batch_file.resolve()), *arguments]
    output.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"sbatch refused {batch_file}: {' '.join(result.stderr.split())}")
    identifier = result.stdout.strip().partition(";")[0]
    say(f"{study.name}: {len(numbers)} of {len(jobs)} runs submitted as the array {identifier}")
    for number in numbers:
        say(f"  {identifier}_{number}: {jobs[number].title}, log {jobs[number].log}")
    say("the same command with --table-only in place of --launcher slurm makes the table of what is finished")


def become_run(
    path: Path,
    output: Path,
    overrides: Sequence[str],
    number: int,
    *,
    command: Sequence[str],
    root: Path,
    list_tasks: ListTasks,
    say: Callable[[str], None] = print,
) -> None:
    """Replace this process by a run of a study, with its output in the run's log; return where it is finished already.

    Args:
        path: The study's YAML file.
        output: The folder of runs and table.
        overrides: Overrides of every run, after the file's.
        number: Which of the study's runs, from 0 on, in the order of :func:`mtcl.launch.study.list_jobs`.
        command: What trains.
        root: The folder that it is started in.
        list_tasks: Returns the tasks of a run with these overrides.
        say: Prints a line.
    """
    study, jobs = plan_study(path, output.resolve(), overrides, list_tasks)
    if number >= len(jobs):
        raise UserError(f"--run {number}: {path} has {len(jobs)} runs; give a number from 0 to {len(jobs) - 1}.")
    job = jobs[number]
    if job.is_finished or job.is_locked:
        say(f"{job.title} is {'finished' if job.is_finished else 'running elsewhere'}")
        return
    write_job(job, overrides, study)
    arguments = job.build_command(command, [f"seed={job.seed}"])
    say(f"{job.title} {'continued' if job.can_resume else 'started'}, log {job.log}")
    with job.log.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"$ {shlex.join(arguments)}\n")
        file.flush()
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(root)
    os.execvpe(arguments[0], arguments, {**os.environ, **study.environment})
