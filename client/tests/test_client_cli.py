"""The command line and the grid it draws."""

import numpy as np
import pytest
from flowturbo_client.cli import main
from flowturbo_client.grid import labelled_grid
from grpc import StatusCode
from PIL import Image


def _generate(triton, folder, *options):
    return main(["generate", "--url", triton.url, "--output", str(folder), *options])


def test_names_files_seeds_and_grid(triton, tmp_path, capsys):
    options = ("--labels", "A", "B/b", "C", "--schedule", "H4", "H1P5R3", "--seed", "17")
    assert _generate(triton, tmp_path, *options, "--batch", "2", "--guidance-scale", "1.5") == 0
    names = [
        f"{name}_seed{seed}_{schedule}_g1.5.png"
        for schedule in ("H4", "H1P5R3")
        for name, seed in (("A", 17), ("B-b-3dffb8a5", 18), ("C", 19))
    ]
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / name) for name in [*names, "grid.png"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "grid.png"])
    assert Image.open(tmp_path / names[1]).getpixel((0, 0)) == (18, 18, 18)
    assert [triton.inputs(i)["seed"].tolist() for i in range(4)] == [[17, 18], [19]] * 2
    assert triton.inputs(0)["guidance_scale"].tolist() == [1.5]
    lines = err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("H4: 2/3 images, ")


def test_no_image_takes_the_place_of_another(triton, tmp_path):
    """Of other classes and scales, though letters of their names cannot stand in a file's."""
    names = ("golden retriever", "a/b", "a b", "a-b", "犬" * 80, "犬" * 81)
    options = ("--labels", *names, "--schedule", "+".join(["H1"] * 40))
    assert _generate(triton, tmp_path, *options) == 0
    assert _generate(triton, tmp_path, *options, "--guidance-scale", "2") == 0
    files = [path.name for path in tmp_path.glob("*_seed*.png")]
    assert len(files) == 2 * len(names)
    assert sum(file.startswith("golden-retriever_seed") for file in files) == 2


def test_text_ids_and_the_seeds_of_several_rows(triton, tmp_path):
    assert _generate(triton, tmp_path, "--characters", "AB") == 0
    assert triton.inputs()["class_name"].tolist() == [b"A", b"B"]
    first, second = triton.inputs()["seed"].tolist()
    assert first != second
    assert (tmp_path / f"A_seed{first}_default.png").exists()
    assert _generate(triton, tmp_path, "--ids", "1", "--schedule", "H4", "--schedule", "H5") == 0
    assert triton.inputs()["label"].tolist() == [1]
    assert triton.inputs(-1)["seed"] == triton.inputs(-2)["seed"]


def test_warmup_is_one_more_request_a_schedule(triton, tmp_path, capsys):
    options = ("--ids", "0", "1", "2", "--batch", "2", "--warmup", "--schedule", "H4", "H5")
    assert _generate(triton, tmp_path, *options) == 0
    assert [len(triton.inputs(i)["label"]) for i in range(6)] == [2, 2, 1] * 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_every_request_names_the_pipeline(triton, tmp_path):
    """Those of the warm-up too."""
    options = ("--ids", "0", "1", "2", "--batch", "2", "--warmup", "--pipeline", "latents")
    assert _generate(triton, tmp_path, *options) == 0
    assert [triton.inputs(i)["pipeline"].tolist() for i in range(3)] == [[b"latents"]] * 3
    assert _generate(triton, tmp_path, "--ids", "0") == 0
    assert "pipeline" not in triton.inputs()


def test_pipelines_are_shown(triton, capsys):
    assert main(["pipelines", "--url", triton.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "glyphs",
        "  condition class_label, takes label or class_name",
        "  size      6x4",
        "  schedules fast H1P5R3, best H8P9R5; or steps such as H1P5R3",
        "  defaults  H1P5R3, guidance 3",
        "  classes   A, B, C, D, E, F, G, H",
        "  images    edits, inpaints and inverts",
        "latents",
        "  condition class_label, takes label or class_name",
        "  size      latents only",
        "  schedules fast H1P5; or steps such as H1P5",
        "  defaults  H1P5, guidance 1",
        "  classes   0 to 999",
        "  images    takes none",
    ]


def test_one_line_on_failure(triton, nobody, tmp_path, capsys):
    triton.script = [(StatusCode.INVALID_ARGUMENT, "schedule 'X'\nis not a schedule")]
    assert _generate(triton, tmp_path, "--characters", "A", "--schedule", "X") == 1
    assert main(["health", "--url", nobody]) == 1
    assert main(["pipelines", "--url", nobody]) == 1
    assert main(["health", "--url", nobody, "--ca", str(tmp_path / "none.pem")]) == 1
    (tmp_path / "file").touch()
    assert _generate(triton, tmp_path / "file", "--characters", "A") == 1
    assert _generate(triton, tmp_path, "--ids", "0", "--seed", "-1") == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 6 and all(line.startswith("flowturbo-client: ") for line in lines)
    assert "schedule 'X' is not a schedule" in lines[0]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--characters", ""],
        ["--characters", "A", "--ids", "1"],
        ["--characters", "A", "--batch", "0"],
    ],
)
def test_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *options])
    assert stopped.value.code == 2


def test_health_table_and_status(triton, capsys):
    assert main(["health", "--url", triton.url]) == 0
    assert "flowturbo: ready" in capsys.readouterr().out
    triton.model_ready = False
    assert main(["health", "--url", triton.url]) == 1
    assert "not ready" in capsys.readouterr().out


def test_grid_places_enlarged_images_in_order():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 99, 199)]]
    rows = [[np.full((32, 32, 3), c, np.uint8) for c in row] for row in colours]
    grid = np.asarray(labelled_grid(rows, ["H4\n1 ms", "H5"], ["A", "a very long name" * 9]))
    corners = {}
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            ys, xs = np.nonzero((grid == colour).all(axis=-1))
            assert len(ys) == 96 * 96 == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
            corners[i, j] = (ys.min(), xs.min())
    assert corners[0, 0][0] == corners[0, 1][0] < corners[1, 0][0] - 95
    assert corners[0, 0][1] == corners[1, 0][1] < corners[0, 1][1] - 95


def test_grid_draws_both_captions():
    row = [np.full((8, 8, 3), 255, np.uint8)]
    blank = np.asarray(labelled_grid([row], [""], [""]))
    assert (blank == 255).all()
    above = np.asarray(labelled_grid([row], [""], ["A"]))
    left = np.asarray(labelled_grid([row], ["H4"], [""]))
    ys, _ = np.nonzero((above < 128).all(axis=-1))
    _, xs = np.nonzero((left < 128).all(axis=-1))
    assert ys.max() < above.shape[0] - 96 and xs.max() < left.shape[1] - 96


@pytest.mark.parametrize(
    ("rows", "row_captions", "column_captions"),
    [
        ([], [], ["A"]),
        ([[np.zeros((2, 2, 3), np.uint8)]], ["x", "y"], ["A"]),
        ([[np.zeros((2, 2, 3), np.uint8)]], ["x"], ["A", "B"]),
        ([[np.zeros((2, 2, 3), np.float32)]], ["x"], ["A"]),
    ],
)
def test_grid_refuses_what_does_not_fit(rows, row_captions, column_captions):
    with pytest.raises(ValueError):
        labelled_grid(rows, row_captions, column_captions)
