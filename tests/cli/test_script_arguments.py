"""Every script answers a wrong command line with one sentence and exit code 1."""

import subprocess
import sys

import pytest
from helpers.common import ROOT, assert_fails

# script -> the arguments it needs, an option and a value that it refuses, an option without its value
CASES = {
    "benchmarks/benchmark_balancing.py": ([], ["--steps", "0"], "--json"),
    "benchmarks/benchmark_data.py": ([], ["--images", "0"], "--size"),
    "benchmarks/benchmark_engine.py": ([], ["--variants", "fastest"], "--steps"),
    "benchmarks/benchmark_features.py": ([], ["--cases", "none"], "--views"),
    "benchmarks/benchmark_inference.py": ([], ["--precision", "fp8"], "--device"),
    "benchmarks/benchmark_metrics.py": ([], ["--run", "-1"], "--images"),
    "benchmarks/benchmark_step.py": ([], ["--steps", "1.5"], "--json"),
    "benchmarks/benchmark_study.py": (["a.yaml"], ["--steps", "0"], "--json"),
    "benchmarks/check_determinism.py": ([], ["--steps", "0"], "--experiment"),
    "benchmarks/compare_curves.py": (["a", "b"], ["--first-step", "x"], "--first-step"),
    "benchmarks/evaluate_edges.py": (
        ["--pred=a", "--gt=b", "--json=c", "--max-dist=0.1"],
        ["--preset", "none"],
        "--workers",
    ),
    "benchmarks/gpu.py": ([], ["--device", "tpu"], "--pieces"),
    "benchmarks/model_table.py": ([], ["--device", "tpu"], "--experiment"),
    "compare.py": (["a"], ["--format", "docx"], "--baseline"),
    "consistency.py": (["a.pt"], ["--frames", "0"], "--compare"),
    "demo.py": (["a.pt"], ["--port", "x"], "--port"),
    "dev/first_hour.py": ([], ["--first-line", "0"], "--wheel"),
    "docs/print_strengths.py": (["a"], None, None),
    "docs/print_validations.py": (["a"], None, "--metrics"),
    "docs/run_notebook.py": (["a.ipynb"], None, "--output"),
    "docs/render_results.py": ([], ["--add", "table"], "--add-output"),
    "export.py": (["a.pt"], ["--opset", "x"], "--output"),
    "import_checkpoint.py": (["invpt", "a", "b"], None, None),
    "label_agreement.py": ([], ["--images", "0"], "--seed"),
    "make_label_file.py": (["--output=a"], ["--rule", "two"], "--seed"),
    "make_shards.py": (["--out=a", "--shards=2"], ["--shards", "0"], "--seed"),
    "plot_study.py": (["a", "--output=b.png"], None, "--reference"),
    "predict.py": (["a.pt", "b.png", "--output=c"], ["--mode", "huge"], "--tasks"),
    "prepare_nyud.py": (["--labeled=a", "--splits=b", "--classes=c", "--out=d"], ["--workers", "-1"], "--size"),
    "prepare_nyuv2_13.py": (["--labeled=a", "--splits=b", "--classes=c", "--out=d"], ["--workers", "-1"], "--out"),
    "prepare_pascal.py": (["--voc=a", "--context=b", "--out=c"], ["--workers", "x"], "--workers"),
    "report.py": (["a", "--output=b"], None, "--title"),
    "runs.py": (["a"], None, None),
    "search.py": (["a.yaml"], ["--trials", "0"], "--baseline"),
    "study.py": (["a.yaml", "--output=b"], ["--jobs", "0"], "--only"),
    "verify_data.py": (["a"], ["--dataset", "none"], "--limit"),
}
SCRIPTS = sorted(CASES)
HYDRA = ["distill.py"]  # whose command line is that of train.py: tests/cli/test_distill.py


def check(result, script, *fragments):
    assert_fails(result, *fragments)
    assert "usage:" not in result.out + result.err, script
    assert len(result.err.splitlines()) == 1, result.err


def test_every_script_has_a_case():
    scripts = (ROOT / "scripts").rglob("*.py")
    assert sorted(path.relative_to(ROOT / "scripts").as_posix() for path in scripts) == sorted([*SCRIPTS, *HYDRA])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_line_is_one_sentence(script, cli):
    needed, wrong_value, flag = CASES[script]
    check(cli(f"scripts/{script}", *needed, "--no-such-flag"), script, "--no-such-flag", "--help lists the options")
    if wrong_value is not None:
        check(cli(f"scripts/{script}", *needed, *wrong_value), script, wrong_value[0])
    if flag is not None:
        check(cli(f"scripts/{script}", *needed, flag), script, flag, "expected")


@pytest.mark.parametrize("script", [one for one in SCRIPTS if CASES[one][0] and one not in ("export.py", "runs.py")])
def test_a_missing_argument_is_one_sentence(script, cli):
    check(cli(f"scripts/{script}"), script, "required")


@pytest.mark.slow
def test_a_process_of_its_own_exits_with_one():
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "a.yaml", "--output", "b", "--jobs", "x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
    assert result.stderr.startswith("error: argument --jobs: x is not a whole number of at least 1")
