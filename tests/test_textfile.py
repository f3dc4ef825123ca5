"""Text files of every system give the same lines."""

import json
from pathlib import Path

import pytest

from export.__main__ import _options
from export.pipeline import _check_names
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.nets.weights import CheckpointError
from flowturbo.presets import read_presets
from flowturbo.textfile import TextFileError, read_lines, read_text

pytestmark = pytest.mark.unit

NAMES = ["tench", "great white shark", "Rémy", "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g", " leading"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \t\r\n"], ids=["unix", "windows", "blanks"])
@pytest.mark.parametrize("last", ["", "\n", "\r\n\r\n \n"], ids=["cut", "ended", "empty lines"])
def test_lines(tmp_path: Path, mark: bytes, end: str, last: str) -> None:
    (tmp_path / "names.txt").write_bytes(mark + (end.join(NAMES) + last).encode())
    assert read_lines(tmp_path / "names.txt") == NAMES


def test_blanks_of_every_width_behind_a_line_are_taken_off(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("cat\u3000\ndog\u00a0\u2003\n".encode())
    assert read_lines(tmp_path / "names.txt") == ["cat", "dog"]


def test_empty_lines_between_are_kept(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\na\n\nb\n")
    assert read_lines(tmp_path / "names.txt") == ["", "a", "", "b"]
    (tmp_path / "names.txt").write_bytes(b"")
    assert read_lines(tmp_path / "names.txt") == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "names.txt").write_bytes("é, a".encode(encoding))
    with pytest.raises(TextFileError, match="names.txt must be UTF-8 text"):
        read_text(tmp_path / "names.txt")


def test_presets_with_a_mark(tmp_path: Path) -> None:
    text = json.dumps({"presets": {"fast": {"schedule": "A4"}}})
    (tmp_path / "presets.json").write_text(text, "utf-8-sig")
    assert read_presets(tmp_path / "presets.json", has_refiner=False) == {"fast": "A4"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "", "d"], "line 3 must be a name, it is empty"),
        (["a", "b", "b ", "d"], "names must be unique, 'b' is in lines 2 and 3"),
        ([" a", "b", "c", "d"], "line 1 must be a name without leading blanks"),
        (["a", "b"], "has 2 names, the predictor has 4 classes$"),
        (list("abcde"), "--num-classes 5: the model then has no null class and no guidance"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path: Path, names: list[str], said: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    options = _options(["--predictor", "p.pt", "--class-names", str(path)])
    with pytest.raises(CheckpointError, match=said):
        _check_names(options, ClassLabel(4))
