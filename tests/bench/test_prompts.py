"""Load and comparison for prompts, on the scenes model."""

import argparse
from pathlib import Path

from support import ROOT

from bench import compare_prompts, load, perf_analyzer
from bench.diffusers_baseline import DiffusersPipeline
from bench.load import Images
from bench.perf_analyzer import Load
from flowturbo import LocalPipeline
from flowturbo.conditions.prompt import PROMPT
from flowturbo.contract import PIPELINE, SEED
from flowturbo.serving.tritonserver import ServerAddress

MODEL = ROOT / "weights" / "scenes" / "model"


def test_diffusers_makes_the_images_of_euler_steps(glyphs_repository: Path) -> None:
    """Same noise, grid, guidance and text length: so the comparison is of equal work."""
    prompts = ["a red letter b left of a blue 7 on white", "a green 4 in the centre on black"]
    expected = LocalPipeline(glyphs_repository, "scenes").generate(
        prompt=prompts, seed=[1, 2], schedule="E6@1", guidance_scale=3.0
    )
    found = DiffusersPipeline(MODEL, threads=2).generate(prompts, [1, 2], 6, 3.0)
    assert expected.image is not None
    assert found.shape == expected.image.shape
    # The service may compute in bfloat16.
    assert abs(found.astype(int) - expected.image.astype(int)).mean() < 2


def test_a_comparison_has_every_contender_and_kind_of_prompts(
    glyphs_repository: Path, tmp_path: Path
) -> None:
    args = argparse.Namespace(
        repository=glyphs_repository,
        pipeline="scenes",
        folder=MODEL,
        schedule="A4",
        clients=2,
        rounds=1,
        seconds=1.0,
        precision=["fp32"],
    )
    report = compare_prompts.compare(args)
    assert report["settings"]["evaluations"] == 4
    assert report["settings"]["mean_difference_levels"] < 2
    rows = {(row["prompts"], row["contender"]): row for row in report["summary"]}
    assert len(rows) == 4
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["different", "service"]["ratio"]["median"] == 1
    assert "FastAPI, diffusers fp32" in compare_prompts.table(report)


def test_requests_for_scenes_have_different_prompts(glyphs_repository: Path) -> None:
    images = Images.of(glyphs_repository, "scenes")
    entries = images.entries(2, "P1", 3.0)
    prompts = [text for each in entries for text in each[PROMPT]["content"]]
    assert len(prompts) == len(images.prompts) > 1000
    assert entries[0][PIPELINE]["content"] == ["scenes"]
    assert entries[0][SEED] == {"content": [0, 1], "shape": [2]}
    asked = images.arguments(5, 2)
    assert (asked["prompts"], asked["seeds"]) == (list(images.prompts[5:7]), [5, 6])
    assert Images.of(glyphs_repository, "glyphs").arguments(5, 2)["labels"] == [0, 1]


def test_scenes_are_load_tested(glyphs_server: ServerAddress, glyphs_repository: Path) -> None:
    tool = perf_analyzer.find_perf_analyzer()
    images = Images.of(glyphs_repository, "scenes")
    plan = load.LoadConfig(**load.QUICK)
    bench = load.Bench(tool, glyphs_server.grpc, plan, 64, images)
    point = bench._measure("few", images.entries(1, "P2"), concurrency=2)
    assert not point["error"]
    assert point["images_per_s"] > 0
    assert point["server"]["models"]["predictor"]["rows_per_execution"] >= 2
    answered = perf_analyzer.run(
        tool, glyphs_server.grpc, images.entries(2, "P1"), Load(concurrency=1, requests=4)
    )
    assert {answer.images for answer in answered.answers} == {2}


def test_the_ratio_is_within_a_round() -> None:
    figures = [
        compare_prompts.Figure(k, "different", name, rate, 1.0, 1.0)
        for k, rates in enumerate([(30.0, 10.0), (20.0, 5.0)])
        for name, rate in zip((compare_prompts.SERVICE, "other"), rates, strict=True)
    ]
    found = compare_prompts._summary("different", "other", figures)
    assert found["ratio"] == {"median": 3.5, "min": 3.0, "max": 4.0}
