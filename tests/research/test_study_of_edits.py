"""The study of edits: on few images and steps, with the real models and the judge."""

import json
from pathlib import Path

import numpy as np
import pytest

from research import editing


@pytest.mark.unit
def test_a_seam_is_the_difference_across_the_border() -> None:
    images = np.zeros((1, 4, 6, 3), np.uint8)
    images[:, :, 3:] = 30
    masks = np.zeros((1, 4, 6), bool)
    masks[:, :, 3:] = True
    assert editing.seam(images, masks) == 30
    assert editing.seam(np.full_like(images, 9), masks) == 0


@pytest.mark.unit
def test_a_ratio_is_of_root_mean_squares() -> None:
    ratio, low, high = editing._ratio(np.full(50, 0.01), np.full(50, 0.04))
    assert ratio == low == high == pytest.approx(2)


def test_the_study_of_few_images(
    glyphs_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "ORIGINALS": "A6",
        "EXACT": "H6",
        "INVERSIONS": ("M5",),
        "STRENGTHS": (0.2, 1.0),
    }.items():
        monkeypatch.setattr(editing, name, value)
    out = tmp_path / "editing.json"
    asked = ["--repository", str(glyphs_repository), "--images", "6", "--json", str(out)]
    assert editing.main([*asked, "--schedule", "E4", "H1P5R3", "H1P3Z1@3"]) == 0
    found = json.loads(out.read_text())
    names = ("half", "box", "strokes")
    assert list(found["inpainting"]) == [*names, *(f"{name}, from noise" for name in names)]
    for task in found["inpainting"].values():
        assert list(task) == ["H6", "E4", "H1P5R3", "H1P3Z1@3"]
        assert all(of["outside"] == 0 and 0 < of["seam"] < 20 for of in task.values())
        assert task["E4"]["ratio"][0] == pytest.approx(1)  # Euler has no use for the velocity
        assert task["H1P5R3"]["velocity"] > 0
    assert found["strengths"].keys() == {"0.2", "1"} and found["inversions"].keys() == {"M5"}
    assert found["strengths"]["0.2"]["old"][0] > found["strengths"]["1"]["old"][0]
    report = out.with_suffix(".md").read_text()
    assert "### strokes, from noise" in report and out.with_suffix(".png").stat().st_size > 10_000
