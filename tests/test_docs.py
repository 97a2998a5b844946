"""The pages of the methods are those that the methods' files make, and no file lacks a part."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lrc.compress.base import methods

DOCS = Path(__file__).resolve().parent.parent / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = script("pages")

ORDER = [
    "What it does", "When to use it", "Settings", "Statistics", "Cost", "How to run it", "Recipe", "Source",
    "Differences from the authors' code",
]  # fmt: skip


@pytest.mark.parametrize("name", methods())
def test_a_methods_page_is_up_to_date_and_in_the_fixed_order(name):
    text = pages.page(methods()[name])
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == ORDER
    assert (DOCS / "methods" / f"{name}.md").read_text() == text, "run make docs"


def test_the_index_names_every_method_and_no_page_is_left_over():
    text = (DOCS / "methods" / "README.md").read_text()
    assert text == pages.index(methods()), "run make docs"
    assert all(f"[`{name}`]({name}.md)" in text for name in methods())
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == {"README", *methods()}


def test_every_setting_is_in_the_table_with_its_default():
    table = pages.settings(methods()["caldera"])
    assert "| `bits` | `2` |" in table and "base of" not in table
    for key in methods()["caldera"].settings.model_fields:
        assert f"| `{key}` |" in table


def test_a_file_that_lacks_a_part_is_named(monkeypatch):
    method = methods()["svd"]
    module = importlib.import_module(method.solve.__module__)
    monkeypatch.setattr(module, "__doc__", "Plain SVD.\n\nSource: Eckart & Young.")
    with pytest.raises(ValueError, match=r"compress/low_rank/svd.py does not say: When to use, Cost"):
        pages.page(method)


def test_the_layout_names_every_file_and_folder_of_the_package_and_no_other():
    root = DOCS.parent
    table = (root / "CONTRIBUTING.md").read_text().partition("| folder or file")[2].partition("\n\n")[0]
    files = {path.name for path in root.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.relative_to(root)}/" for path in root.glob("*/__init__.py")} - {"recipes/"}
    assert set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)) == files | folders
    assert not [name for name in re.findall(r"`([\w/]+/)`", table) if not (root / name).is_dir()]


def test_every_file_that_the_guides_name_is_there():
    root = DOCS.parent
    for guide in ("README.md", "CONTRIBUTING.md", "docs/allocation.md", "docs/table.md"):
        named = set(re.findall(r"\b((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|md|yaml))\b", (root / guide).read_text()))
        assert not [name for name in sorted(named) if not (root / name).is_file()], guide


def test_the_page_of_errors_is_that_of_the_code():
    assert (DOCS / "errors.md").read_text() == script("error_list").page(), "run make docs"


@pytest.mark.parametrize("broken", [False, True])
def test_the_site_has_no_broken_link(broken, tmp_path):
    """`make site` passes, and it would not with a link to a page that is not there."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(DOCS.parent / "mkdocs.yml", tmp_path)
    if broken:
        (tmp_path / "docs" / "speed.md").write_text("[gone](gone.md)\n")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--config-file", tmp_path / "mkdocs.yml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode != 0) == broken, done.stdout + done.stderr
    assert broken or "LOG" not in {path.name for path in (tmp_path / "site").iterdir()}
