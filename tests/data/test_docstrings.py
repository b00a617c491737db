"""The demo's data: balanced, without the answer in the question, and the same on every reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fs_fwdllm.data import docstrings
from fs_fwdllm.data.docstrings import GIVE_AWAYS, LIBRARIES, installed_docstrings, mask_give_aways
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import DataError


@pytest.fixture(scope="module")
def table() -> Table:
    return installed_docstrings(rows_per_library=80)


def test_classes_are_balanced(table) -> None:
    counts = Counter(table.column("label"))
    assert {"numpy", "python", "torch", "transformers"} <= counts.keys() <= LIBRARIES.keys()
    assert set(counts.values()) == {80}


def test_no_text_gives_its_library_away(table) -> None:
    for text in table.texts("text"):
        words = text.casefold()
        assert not any(name in words for name in GIVE_AWAYS), text
        assert "np." not in words.split() and not words.startswith("np."), text


def test_texts_are_distinct_sentences(table) -> None:
    texts = table.texts("text")
    assert len({text.casefold() for text in texts}) == len(texts)
    assert all(20 <= len(text) <= 500 and len(text.split()) >= 4 and "\n" not in text for text in texts)


def test_modules_are_parts_of_their_library(table) -> None:
    for record in table.records:
        package = LIBRARIES[record["label"]]
        assert record["module"].split(".")[0] == package or not package
        assert record["module"].count(".") <= 1
    assert len(set(table.column("module"))) > 20


def test_reading_twice_gives_the_same_rows(table) -> None:
    assert installed_docstrings(rows_per_library=80).records == table.records


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Returns a torch.nn.Linear for PyTorch", "Returns a library.nn.Linear for library"),
        ("a scikit-learn or scikit learn, scikits estimator", "a library or library, library estimator"),
        ("use np.array, numpy_array and NumPy's", "use library.array, library and library's"),
        ("Hugging Face HuggingFaceHub transformers", "library library library"),
        ("a transformer input, npz file, CPython", "a transformer input, npz file, library"),
    ],
)
def test_masking(text, masked) -> None:
    assert mask_give_aways(text) == masked


SOURCE = '''
"""Module docstring is not a row."""
def first(x):
    """Multiply the numbers
    of two lists.

    A second paragraph."""
    def inner():
        """An inner function is no interface."""
class Second:
    """Keep track of everything there is. """
    async def method(self):
        """Wait for the answer to come.
        Args:
            nothing"""
    def signature(self):
        """signature(self) -> what it was called with"""
if True:
    def conditional():
        """Defined only where it is possible."""
def short():
    """Too short."""
'''


def build(folder: Path, package: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def install(monkeypatch, folder: Path, *packages: str) -> None:
    monkeypatch.setattr(docstrings, "LIBRARIES", {package: package for package in packages})
    monkeypatch.syspath_prepend(folder)


def test_which_docstrings_are_rows(tmp_path, monkeypatch) -> None:
    build(tmp_path, "library_a", {"__init__.py": "", "part/deep/file.py": SOURCE, "broken.py": "def (:"})
    build(tmp_path, "library_b", {"__init__.py": 'def f():\n    """Keep track of something else."""\n'})
    build(tmp_path, "library_a/tests", {"test_file.py": 'def f():\n    """Tests are not documentation."""\n'})
    install(monkeypatch, tmp_path, "library_a", "library_b")
    rows = {(record["text"], record["label"], record["module"]) for record in installed_docstrings().records}
    assert rows == {
        ("Multiply the numbers of two lists.", "library_a", "library_a.part"),
        ("Keep track of everything there is.", "library_a", "library_a.part"),
        ("Wait for the answer to come.", "library_a", "library_a.part"),
        ("Defined only where it is possible.", "library_a", "library_a.part"),
        ("Keep track of something else.", "library_b", "library_b"),
    }


def test_texts_two_libraries_share_are_dropped(tmp_path, monkeypatch) -> None:
    shared = 'def f():\n    """Both of them say this."""\n'
    build(tmp_path, "library_c", {"__init__.py": shared + 'def g():\n    """Only one of them says this."""\n'})
    build(tmp_path, "library_d", {"__init__.py": shared})
    install(monkeypatch, tmp_path, "library_c", "library_d")
    assert [record["text"] for record in installed_docstrings().records] == ["Only one of them says this."]


def test_nothing_is_imported(tmp_path, monkeypatch) -> None:
    text = 'raise SystemExit\ndef f():\n    """Never run this file of {}."""\n'
    build(tmp_path, "library_e", {"__init__.py": text.format("ours")})
    build(tmp_path, "library_f", {"__init__.py": text.format("theirs")})
    install(monkeypatch, tmp_path, "library_e", "library_f")
    assert len(installed_docstrings()) == 2


def test_fewer_than_two_libraries_is_an_error(tmp_path, monkeypatch) -> None:
    build(tmp_path, "library_g", {"__init__.py": 'def f():\n    """All alone in this world."""\n'})
    install(monkeypatch, tmp_path, "library_g", "library_that_is_not_there")
    with pytest.raises(DataError, match=r"at least two of library_g, library_that_is_not_there, but found library_g"):
        installed_docstrings()
