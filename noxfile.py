"""The matrix: `nox` runs all sessions, `nox -s bare` one, `nox -l` lists them. CI runs `make`, which is one of them."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
PYTHONS = ["3.11", "3.12", "3.13"]
FAST = ["-n", "auto", "-m", "not slow"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the fast tests with the versions of constraints.txt."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("python", "-m", "pytest", *FAST, *session.posargs)


@nox.session(python=PYTHONS[0])
def lower_bounds(session: nox.Session) -> None:
    """Run the fast tests with the oldest dependencies that pyproject.toml allows, as far as it names them."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    oldest = [one.split(",")[0].replace(">=", "==") for one in dependencies if ">=" in one]
    session.install("--editable", ".", *oldest, "pytest", "pytest-xdist", "hypothesis")
    session.run("python", "-m", "pytest", *FAST, *session.posargs)


@nox.session(python=PYTHONS[0])
def bare(session: nox.Session) -> None:
    """Run the fast tests without any extra: no ONNX, Gradio, solvers of TorchJD, Optuna, hub."""
    session.install("--constraint", "constraints.txt", "--editable", ".", "pytest", "pytest-xdist", "hypothesis")
    session.run("python", "-m", "pytest", *FAST, *session.posargs)
