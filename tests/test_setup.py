"""The lists of packages agree, and every way in leads to the same commands."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEV = PROJECT["optional-dependencies"]["dev"]
PINS = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]
# A GPU machine without Jupyter can measure: everything but torch is blocked.
TORCH_ONLY = ["units", "models", "checkpointing", "from_scratch", "timeline"]
TORCH_ONLY += ["dry_run", "allocator", "measure", "recording"]
BLOCKED = ["IPython", "PIL", "ipywidgets", "matplotlib", "numpy", "pandas", "tqdm"]


def normal(name):
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned_versions():
    return {normal(name): version for name, version in (p.split("==") for p in PINS)}


def test_the_pins_hold_on_every_machine():
    # no path, no option and no local suffix such as +cpu
    assert [pin for pin in PINS if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []


def test_the_lock_is_sorted_and_names_a_package_once():
    names = [pin.split("==")[0] for pin in PINS]
    assert PINS == sorted(PINS, key=str.upper)
    assert len({normal(name) for name in names}) == len(names)


@pytest.mark.parametrize("dependency", PROJECT["dependencies"] + DEV)
def test_a_dependency_is_pinned_within_its_range(dependency):
    wanted = Requirement(dependency)
    assert wanted.specifier, "a range says what works"
    assert Version(pinned_versions()[normal(wanted.name)]) in wanted.specifier


def test_torch_is_the_version_that_the_notebooks_were_run_with():
    assert "torch==2.13.0" in PINS


def test_conda_brings_python_and_leaves_the_packages_to_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert PROJECT["requires-python"] in python
    assert pip == "pip"
    assert packages == {"pip": ["-c requirements.lock", "-e .[dev]"]}


def test_every_way_in_runs_make_test():
    run = ROOT / ".ci" / "run"
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert os.access(run, os.X_OK)
    assert run.read_text().splitlines()[-1] == "make test"
    assert steps[-1] == {"run": ".ci/run"}
    assert "make test" in (ROOT / "README.md").read_text()


def test_cudas_tests_have_an_environment_and_a_job_of_their_own():
    makefile = (ROOT / "Makefile").read_text()
    assert "PIP_FIND_LINKS=$(CURDIR)/$(CUDA_VENV)/none" in makefile, "a wheel with CUDA"
    assert "-c requirements.lock torch" in makefile, "of the pinned version"
    installed = re.search(r"-c requirements.lock (torch[^']*)", makefile)[1].split()
    for dependency in PROJECT["dependencies"]:  # notebooks run there, without Jupyter
        assert (name := Requirement(dependency).name) in [*installed, "jupyterlab"], (
            name
        )
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test-cuda"]["steps"]
    assert steps[-1] == {"run": "make test-cuda"}
    for script in ("test.sh", "run.sh", "build.sh"):
        assert os.access(ROOT / "tests" / "nocard" / script, os.X_OK)


def test_make_installs_what_conda_installs():
    makefile = (ROOT / "Makefile").read_text()
    assert "install -c requirements.lock -e '.[dev]'" in makefile


def test_a_reader_works_on_copies_which_stay_until_they_are_renewed(tmp_path):
    page = Path("00_start_here.ipynb")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / page).write_text("as published")
    shutil.copytree(ROOT / "notebooks/images", tmp_path / "notebooks/images")
    shutil.copy(ROOT / "Makefile", tmp_path)
    copy, own = tmp_path / "work" / page, tmp_path / "work" / "own.ipynb"

    def make(target: str) -> str:
        subprocess.run(["make", target], cwd=tmp_path, check=True, capture_output=True)
        return copy.read_text()

    assert make("work") == "as published"
    copy.write_text("as the reader left it")
    own.write_text("a page of the reader's")
    assert make("work") == "as the reader left it"
    assert make("fresh") == "as published"
    assert own.read_text() == "a page of the reader's"
    assert "lab: $(INSTALLED) work" in (ROOT / "Makefile").read_text()
    assert "work/" in (ROOT / ".gitignore").read_text().splitlines()


def test_measuring_needs_torch_alone():
    names = [f"helpers.{name}" for name in TORCH_ONLY]
    for package in TORCH_ONLY:
        files = (ROOT / "helpers" / package).glob("[!_]*.py")
        names += sorted(f"helpers.{package}.{path.stem}" for path in files)
    program = (
        f"import importlib, sys; sys.modules.update(dict.fromkeys({BLOCKED}));"
        f"list(map(importlib.import_module, {names}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
