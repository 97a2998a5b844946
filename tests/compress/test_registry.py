"""How methods and forms are found: by importing the files of a package, wherever they lie in it."""

from __future__ import annotations

import sys
import textwrap

import pytest

import lrc.compress
import lrc.compress.low_rank
from lrc.compress import base
from lrc.compress.registry import import_all


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def method(name):
    return f'''
        """A method that nobody should use."""
        from lrc.compress.base import Factored, method

        @method("{name}", source="a test")
        def solve(weight, stats, settings):
            raise NotImplementedError
        '''


def test_a_method_is_found_in_a_family_folder_and_in_a_new_folder(tmp_path, monkeypatch):
    """As if `dropped.py` were put into compress/low_rank, and the folder `novel` into compress/."""
    write(tmp_path / "family" / "dropped.py", method("dropped"))
    write(tmp_path / "more" / "novel" / "__init__.py")
    write(tmp_path / "more" / "novel" / "another.py", method("another"))
    monkeypatch.setattr(lrc.compress.low_rank, "__path__", [*lrc.compress.low_rank.__path__, str(tmp_path / "family")])
    monkeypatch.setattr(lrc.compress, "__path__", [*lrc.compress.__path__, str(tmp_path / "more")])
    try:
        found = base.methods()
        assert found["dropped"].solve.__module__ == "lrc.compress.low_rank.dropped"
        assert found["another"].solve.__module__ == "lrc.compress.novel.another"
        assert found["dropped"].summary == "A method that nobody should use."
    finally:
        for name in ("dropped", "another"):
            base._METHODS.pop(name, None)
        for name in [name for name in sys.modules if name.startswith(("lrc.compress.novel", "lrc.compress.low_rank.dropped"))]:
            del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A function that writes files into a new package and returns the package's name."""
    name = f"zoo_{abs(hash(request.node.name))}"
    monkeypatch.syspath_prepend(tmp_path)

    def make(*files, broken=None):
        for file in ("__init__.py", *files):
            write(tmp_path / name / file, "import no_such_library" if file == broken else "")
        return name

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_files_are_found_in_folders_inside_folders(package):
    name = package("a.py", "inner/__init__.py", "inner/b.py", "inner/deep/__init__.py", "inner/deep/c.py")
    import_all(name)
    assert {f"{name}.a", f"{name}.inner.b", f"{name}.inner.deep.c"} <= sys.modules.keys()


@pytest.mark.parametrize("folder", ["forgotten", "inner/forgotten"])
def test_a_folder_without_init_is_refused(folder, package):
    name = package("inner/__init__.py", f"{folder}/a.py")
    with pytest.raises(ImportError, match=r"forgotten has Python files and no __init__\.py"):
        import_all(name)


@pytest.mark.parametrize("broken", ["a.py", "inner/__init__.py", "inner/b.py"])
def test_an_import_that_fails_is_not_hidden(broken, package):
    name = package("a.py", "inner/__init__.py", "inner/b.py", broken=broken)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import_all(name)
