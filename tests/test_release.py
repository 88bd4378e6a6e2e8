"""The version is one number, wherever it stands."""

import re
import tomllib

import yaml
from helpers.common import ROOT

from mtcl.version import __version__


def test_version_citation_and_changelog_agree():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    version, date = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", headings[1]).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert version == str(citation["version"]) == __version__
    assert date == str(citation["date-released"])


def test_the_build_reads_the_version_from_its_one_place():
    """A number in pyproject.toml or setup.py would be a second place."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" in pyproject["project"]["dynamic"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mtcl.version.__version__"}
    assert "version" not in (ROOT / "setup.py").read_text("utf-8")
    # setuptools reads the attribute without importing the package, which needs torch: it has to be a literal.
    assert f'__version__ = "{__version__}"\n' in (ROOT / "mtcl" / "version.py").read_text("utf-8")
