"""Quality: figures against known distributions, images that resume, baselines on the real model."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flowturbo_client import FlowTurboClient
from PIL import Image
from support import GLYPHS, GOLDEN, GOLDEN_EXPORT, run_export
from torch import nn

from export.install import write_record
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.latents import noise
from flowturbo.nets.weights import CheckpointError
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.tritonserver import ServerAddress
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.textfile import TextFileError
from research.quality import __main__ as command
from research.quality import judges
from research.quality.engine import (
    BATCH,
    Engine,
    Exact,
    ExactClasses,
    SamplingSpec,
    distances,
    exact_of,
    find_sampler,
)
from research.quality.evaluate import Evaluator, kept, models_digest, served
from research.quality.images import ImageFolder, Speed
from research.quality.judges import Classifier, Inception, load_reference
from research.quality.metrics import (
    Figure,
    distance_to,
    figures,
    half_width,
    inception_score,
    near,
    without_block,
)
from research.quality.samplers import Counted
from research.quality.subjects import Classes
from training.frechet import Reference, Statistics
from training.judging import Features

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, 64, 64, 3), np.uint8)
LABELS, SEEDS = np.array([0, 35, 7]), np.array([3, 2**40, 9])


@pytest.fixture(scope="module")
def engine(glyphs_repository: Path) -> Engine:
    return Engine(glyphs_repository)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    """With random weights, which a file has to hold like the published ones."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    extractor = judges._fidelity().FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        blank = extractor("inception", ["2048"], "nothing")
    torch.manual_seed(0)
    for module in blank.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(blank.state_dict(), path)
    return Inception(path)


def test_inception_score_counts_the_classes_seen() -> None:
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7)
    assert inception_score(np.full((70, 7), 1 / 7)) == pytest.approx(1)


def test_precision_and_recall_of_parts() -> None:
    """Images of one of two far apart kinds: all are real, half of the real ones is covered."""
    one = RNG.standard_normal((1500, 2))
    real, found = np.concatenate([one, one + 100]), RNG.standard_normal((1400, 2))
    precision, recall = near(found, real), near(real, found)
    assert precision.shape == (1400,)
    assert precision.mean() > 0.97
    assert recall[:1500].mean() > 0.96
    assert not recall[1500:].any()


@pytest.mark.parametrize(
    ("figure", "draw"),
    [
        (
            distance_to(Statistics(np.zeros(2), np.eye(2))),
            lambda: 1.0 + RNG.standard_normal((500, 2)),
        ),
        (inception_score, lambda: RNG.dirichlet([0.2, 0.3, 0.5], 500)),
        (np.mean, lambda: RNG.random(500) < 0.9),
    ],
)
def test_the_interval_is_as_wide_as_the_figure_varies(
    figure: Figure, draw: Callable[[], np.ndarray]
) -> None:
    """95% of a figure's distance to its mean, against its spread over many repetitions."""
    draws = [without_block(draw(), figure) for _ in range(200)]
    spread = np.std([np.mean(each) for each in draws])
    widths = [half_width(each) for each in draws]
    assert np.mean(widths) / 2.262 == pytest.approx(spread, rel=0.2)


def test_what_is_not_known_is_left_out() -> None:
    seen = Features(*(RNG.random((30, k)).astype(np.float32) for k in (4, 5, 6)))
    known = asdict(figures(seen, Reference(Statistics.of(seen.pooled)), None))
    assert known.pop("frechet_distance") == pytest.approx(0, abs=1e-9)
    always = {"images", "frechet_interval", "frechet_distance_without_block"}
    always |= {"inception_score", "inception_score_interval"}
    assert {key for key, value in known.items() if value not in (None, {})} == always
    reference = Reference(Statistics.of(seen.pooled), Statistics.of(seen.spatial), seen.pooled)
    every = asdict(figures(seen, reference, Classes(1).right(seen.probability, np.arange(30))))
    assert None not in every.values()
    assert (every["knn_precision"], every["knn_precision_interval"]) == (1, 0)
    few = Features(seen.pooled[:9], seen.spatial[:9], seen.probability[:9])
    stated = asdict(figures(few, reference, Classes(1).right(few.probability, np.arange(9))))
    assert [value for key, value in stated.items() if key.endswith("interval")] == [None] * 5


def test_the_committed_reference_is_of_real_images() -> None:
    """Its statistics are of 10,000 images, its rows those of the first 5,000."""
    eyes = Evaluator.open(GLYPHS, None, None)
    assert eyes.reference.features is not None
    assert eyes.reference.spatial is not None
    part = Statistics.of(eyes.reference.features)
    assert np.abs(part.mean - eyes.reference.pooled.mean).max() < 0.01
    assert eyes.reference.spatial.mean.shape == (448,)


def test_references_of_images_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, ADM's sample batch and ADM's reference batch of the same images."""
    judge = Classifier(GLYPHS)
    folder = ImageFolder(tmp_path / "images", {}, Classes(4))
    folder.fill(6, lambda seeds: PICTURES[seeds], batch=4)
    folder.to_npz(tmp_path / "samples.npz", 6)
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], PICTURES)
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 0, 1]
    one = load_reference(folder.path, judge)
    batch = {"mu": one.pooled.mean, "sigma": one.pooled.covariance}
    np.savez(tmp_path / "batch.npz", PICTURES, **batch)
    for path in ("samples.npz", "batch.npz"):
        other = load_reference(tmp_path / path, judge)
        np.testing.assert_array_equal(one.pooled.covariance, other.pooled.covariance)
        np.testing.assert_array_equal(one.features, other.features)
    monkeypatch.setattr(judges, "_READ", 4)  # more than one batch
    other = load_reference(folder.path, judge)
    np.testing.assert_allclose(one.features, other.features, atol=1e-5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="2 images"):
        load_reference(tmp_path / "empty", judge)
    Image.new("RGB", (64, 32)).save(folder.path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has 64 x 32 pixels and .*000000\.png 64 x 64"):
        load_reference(folder.path, judge)


def test_many_images_are_written_a_batch_at_a_time(tmp_path: Path) -> None:
    """As np.savez writes them, which ADM's evaluator reads."""
    images = RNG.integers(0, 256, (600, 2, 3, 3), np.uint8)  # batches has 500 at a time
    folder = ImageFolder(tmp_path / "images", {}, Classes(4))
    folder.write(np.arange(600), images)
    folder.to_npz(tmp_path / "found.npz", 600)
    np.savez(tmp_path / "expected.npz", images, np.arange(600) % 4)
    with zipfile.ZipFile(tmp_path / "found.npz") as found:
        with zipfile.ZipFile(tmp_path / "expected.npz") as expected:
            assert found.namelist() == expected.namelist()
            for name in found.namelist():
                assert found.read(name) == expected.read(name)


def test_images_resume_and_extend(tmp_path: Path) -> None:
    made: list[int] = []

    def make(seeds: np.ndarray) -> np.ndarray:
        if 4 in seeds and not made.count(4):
            made.append(4)
            raise ConnectionError
        made.extend(seeds.tolist())
        return PICTURES[seeds]

    folder = ImageFolder(tmp_path, {"spec": "H8"}, Classes(3))
    with pytest.raises(ConnectionError):
        folder.fill(6, make, batch=2)
    assert folder.missing(6).tolist() == [4, 5]
    first = folder.speed
    assert (first.images, first.seconds > 0) == (4, True)
    speed = ImageFolder(tmp_path, {"spec": "H8"}, Classes(3)).fill(6, make, batch=2)
    assert (speed.images, made) == (2, [0, 1, 2, 3, 4, 4, 5])
    assert folder.speed == Speed(6, first.seconds + speed.seconds)
    assert np.array_equal(np.concatenate(list(folder.batches(6, size=4))), PICTURES)
    assert folder.fill(6, make).ms_per_image is None
    assert folder.speed.images == 6
    with pytest.raises(ValueError, match="not of"):
        ImageFolder(tmp_path, {"spec": "H7"}, Classes(3))


def test_inception_sees_what_adm_takes(inception: Inception) -> None:
    seen = inception(PICTURES[:2])
    shapes = seen.pooled.shape, seen.spatial.shape, seen.probability.shape
    assert shapes == ((2, 2048), (2, 7 * 17 * 17), (2, 1008))
    np.testing.assert_allclose(seen.probability.sum(1), 1, rtol=1e-5)
    assert np.abs(seen.pooled[0] - seen.pooled[1]).max() > 0
    hidden: list[torch.Tensor] = []
    branch = inception._model.Mixed_6d.branch1x1
    handle = branch.register_forward_hook(lambda _, __, output: hidden.append(output))
    inception(PICTURES[:1])
    handle.remove()
    place = seen.spatial[0].reshape(17, 17, 7)[3, 11]
    np.testing.assert_allclose(place, hidden[0][0, :7, 3, 11], rtol=1e-4, atol=1e-6)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FlowTurboError, match="does not load as Inception"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--reference"):
        Evaluator.open(GLYPHS, tmp_path / "other.pth", None)


def test_the_glyphs_judge_is_for_glyphs() -> None:
    with pytest.raises(ValueError, match="knows 36 classes, the model has 1000: give --inception"):
        Evaluator.open(GLYPHS, None, None, Classes(36), Classes(1000))
    with pytest.raises(ValueError, match="reads images of 64 x 64 pixels, these have 32 x 64"):
        Classifier(GLYPHS)(np.zeros((2, 32, 64, 3), np.uint8))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_velocity_is_the_programs(
    golden_repository: Path, scale: float, interval: tuple[float, float]
) -> None:
    """Heun and pseudo-corrector steps written over the velocity make the service's latents."""
    engine = Engine(golden_repository)
    labels = engine.subject.labels(SEEDS)
    expected = engine.generate(labels, SEEDS, "H2P4", scale, guidance_interval=interval).latent
    v = Counted(engine.velocity(SEEDS, Guidance(scale, interval)))
    found = noise(SEEDS, engine.pipeline.latent_shape)
    h, ahead = 1 / 6, found
    for k, letter in enumerate("HHPPPP"):
        cached = v(found, k * h) if letter == "H" else ahead
        ahead = v(found + h * cached, (k + 1) * h)
        found = found + h / 2 * (cached + ahead)
    assert v.evaluations == 8
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_solvers_approach_the_exact_solution(engine: Engine) -> None:
    exact = ExactClasses(GLYPHS / "predictor.safetensors")
    solved = exact.latent(engine.subject, SEEDS, Guidance(3.0))
    away = {
        name: distances(engine.make(SamplingSpec(name, 3.0), SEEDS).latent, solved).mean()
        for name in ("H4", "H32", "U32", "dopri5:1e-2")
    }
    assert max(far for name, far in away.items() if name != "H4") < 0.3 * away["H4"]


def test_the_exported_file_in_float32_is_as_exact(
    engine: Engine, glyphs_repository: Path, tmp_path: Path
) -> None:
    """As near to PyTorch as the export checked, whatever precision serves the model."""
    seeds, guidance = np.arange(3), Guidance(3.0)
    checkpoint = exact_of(glyphs_repository, None, GLYPHS / "predictor.safetensors")
    exported = exact_of(glyphs_repository, None, None)
    wanted = checkpoint.latent(engine.subject, seeds, guidance)
    found = exported.latent(engine.subject, seeds, guidance)
    assert distances(found, wanted).max() < 2e-3
    assert exported.digest != checkpoint.digest
    repository = tmp_path / "models"
    half = [
        *GOLDEN_EXPORT,
        "--runtime",
        "openvino",
        "--precision",
        "bf16",
        "--repository",
        repository,
    ]
    assert run_export(*half).returncode == 0
    with pytest.raises(ValueError, match="not a float32 file .* give --predictor"):
        exact_of(repository, None, None)


@pytest.mark.parametrize("sampler", ["H8X", "R3", "dopri5:0", "H1 P5"])
def test_a_sampler_that_cannot_be_read(sampler: str) -> None:
    with pytest.raises(RequestError):
        SamplingSpec(sampler, 3.0)


def test_what_a_sampler_may_be(golden_repository: Path) -> None:
    pipeline = read_pipeline(golden_repository)
    found = {text: find_sampler(text, pipeline) for text in ("fast", "HPP", "U8@2", "dopri5")}
    assert list(found.values()) == ["H1P5R3", "H1P2", "U8@2", "dopri5"]
    with pytest.raises(RequestError) as caught:
        find_sampler("swift", pipeline)
    for named in (
        "'swift'",
        "a schedule is letters",
        "presets here are fast",
        "baseline is dopri5",
    ):
        assert named in str(caught.value)
    alone = replace(pipeline, models={Role.PREDICTOR: pipeline.predictor})
    assert find_sampler("fast", alone) == "H1P5"
    with pytest.raises(RequestError, match="H1P5R3 has refiner steps"):
        find_sampler("H1P5R3", alone)


def test_the_command_goes_on_with_its_images(
    glyphs_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--repository", glyphs_repository, "--weights", GLYPHS, "--schedule", "P4", "P3T1"]
    words += ["--out", tmp_path / "images", "--npz", "--json", tmp_path / "quality.json"]
    for count, made in ((24, 24), (36, 12), (36, 0)):
        assert command.main([*map(str, words), "--images", str(count)]) == 0
        printed = capsys.readouterr().out
        assert f"({count} images each)" in printed
        assert printed.count("±") == 2 * 5
        rows = json.loads((tmp_path / "quality.json").read_text())
        assert [(row["images"], row["made"]) for row in rows] == [(count, made)] * 2
    assert min(row["ms_per_image"] for row in rows) > 0  # of the runs before
    assert [row["schedule"] for row in rows] == ["P4", "P3T1"]
    assert [row["predictor"] for row in rows] == [5, 4]
    assert min(row["recognised"] for row in rows) > 0.5
    for path in (tmp_path / "images").glob("*.npz"):
        assert np.load(path)["arr_0"].shape == (36, 64, 64, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedule", "P4", "h8"], "schedule 'h8' cannot be read"),
        (["--schedule", "P4", "dopri5", "--server", "localhost:1"], "not dopri5"),
        (["--schedule", "P4", "--server", "localhost:1"], "localhost:1"),
        (["--schedule", "P4", "--reference", "nowhere.npz"], "nowhere.npz"),
        (["--schedule", "P4", "--reference", __file__], "neither a folder of images nor an .npz"),
        (["--schedule", "P4", "--exact", "2", "--predictor", "missing.pt"], "missing.pt"),
        (["--schedule", "P4", "--reference", "{other}"], "other.npz has mu of 2048 features, this"),
    ],
)
def test_what_is_wrong_is_said_before_images_are_made(
    words: list[str | Path],
    said: str,
    glyphs_repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, mu=np.zeros(2048), sigma=np.eye(2048))
    words = [str(word).format(other=other) for word in words]
    words = ["--repository", glyphs_repository, "--weights", GLYPHS, "--out", tmp_path, *words]
    assert command.main([*map(str, words), "--images", "20"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("quality: ")
    assert said in line
    assert not list(tmp_path.rglob("*.png"))
    for refused in (
        ["--server=localhost:1", "--exact=2"],
        ["--npz"],
        ["--images=1"],
        ["--exact=-1"],
    ):
        with pytest.raises(SystemExit):
            command.main(refused)


def test_a_service_that_takes_few_images_is_judged_too(
    golden_repository: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    config = repository / "flowturbo" / "config.pbtxt"
    most = re.compile(r'(key: "max_images", value: { string_value: )"\d+"')
    config.write_text(most.sub(r'\1"8"', config.read_text()))
    engine = Engine(repository)
    assert Settings.load(repository).max_images == 8
    seeds = np.arange(BATCH)
    assert engine.generate(seeds % 3, seeds, "H1").latent.shape[0] == BATCH


def test_rows_are_written_as_they_are_done(
    glyphs_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The second cannot be: its folder has images of something else."""
    words = ["--repository", glyphs_repository, "--weights", GLYPHS, "--schedule", "P2", "P1"]
    words += ["--out", tmp_path, "--images", "20", "--json", tmp_path / "quality.json"]
    assert command.main(list(map(str, words))) == 0
    capsys.readouterr()
    (spec,) = tmp_path.glob("P1_*/spec.json")
    spec.write_text("{}")
    assert command.main(list(map(str, words))) == 2
    (row,) = json.loads((tmp_path / "quality.json").read_text())
    assert row["schedule"] == "P2"
    printed = capsys.readouterr()
    assert "P2 " in printed.out
    assert "has images of {}" in printed.err


def test_exact_is_guided_as_the_repository_is(golden_repository: Path, tmp_path: Path) -> None:
    repository, predictor = tmp_path / "models", GOLDEN / "predictor.pt"
    shutil.copytree(golden_repository / "flowturbo", repository / "flowturbo")
    pipeline = read_pipeline(repository)
    seeds, guidance = np.array([1, 2]), Guidance(3.0)
    x = noise(seeds, pipeline.latent_shape)

    def guided(exact: Exact) -> np.ndarray:
        return exact.velocity(Classes(11), seeds, guidance)(x, 0.5)

    plain = ExactClasses(predictor, num_heads=2)
    assert plain.digest != ExactClasses(predictor, num_heads=4).digest
    same = Exact.of_repository(predictor, repository)
    assert same.digest == plain.digest
    np.testing.assert_array_equal(guided(same), guided(plain))
    options = {**pipeline.fingerprint["options"], "guidance_channels": 2}
    fingerprint = {**pipeline.fingerprint, "options": options}
    write_record(repository, replace(pipeline, fingerprint=fingerprint))
    other = Exact.of_repository(predictor, repository)
    assert other.digest != plain.digest
    apart = np.abs(guided(other) - guided(plain)).max((0, 2, 3))
    assert (apart > 0).tolist() == [False, False, True, False]
    assert ExactClasses(predictor, num_heads=2, num_classes=11).digest != plain.digest
    weights = torch.load(predictor, weights_only=True)
    torch.save({**weights, "pos_embed": 2 * weights["pos_embed"]}, tmp_path / "other.pt")
    for checkpoint in (GLYPHS / "predictor.safetensors", tmp_path / "other.pt"):
        with pytest.raises(CheckpointError, match="is not the file that .* was exported from"):
            Exact.of_repository(checkpoint, repository)


def test_figures_from_before_pipelines_had_names_stay_valid(
    glyphs_repository: Path, tmp_path: Path
) -> None:
    """The committed figures name the networks by this digest."""
    shutil.copytree(glyphs_repository / "flowturbo", tmp_path / "flowturbo")
    pipeline = read_pipeline(tmp_path)
    form = {"runtime": "openvino", "precision": "bf16"}  # on the machine that made them
    models = {role: replace(model, **form) for role, model in pipeline.models.items()}
    write_record(tmp_path, replace(pipeline, models=models))
    committed = json.loads((GLYPHS / "presets.json").read_text())["models"]
    assert models_digest(tmp_path) == committed
    models[Role.PREDICTOR] = replace(models[Role.PREDICTOR], precision="fp32")
    write_record(tmp_path, replace(pipeline, models=models))
    assert models_digest(tmp_path) != committed


def test_references_that_are_none(tmp_path: Path) -> None:
    judge, path = Classifier(GLYPHS), tmp_path / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    mean, covariance = np.zeros(3), np.eye(3)
    for arrays, said in [
        ({"arr_0": images / 255.0}, r"arr_0 must be 2 images .*uint8, it is \[4, 64, 64, 3\] of f"),
        ({"arr_0": images.astype(np.uint16)}, "of uint16"),
        ({"arr_0": images[:1]}, r"arr_0 must be 2 images or more.* it is \[1, 64"),
        ({"arr_0": images[:0]}, r"arr_0 must be 2 images or more.* it is \[0, 64"),
        ({"arr_0": images[..., 0]}, r"it is \[4, 64, 64\]"),
        ({"mu": mean}, "must have mu .D. and sigma"),
        ({"mu": mean, "sigma": np.eye(4)}, "must have mu .D. and sigma"),
        ({"mu": np.full(3, np.nan), "sigma": covariance}, "mu must be finite"),
        ({"mu": mean, "sigma": covariance, "mu_s": mean}, "must have mu_s .D. and sigma_s"),
        ({"other": mean}, "must have mu and sigma, it has other"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=said) as caught:
            load_reference(path, judge)
        assert str(path) in str(caught.value)
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="real.npz"):
        load_reference(path, judge)


def test_files_of_a_run_that_are_damaged_are_named(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "images", {}, Classes(3))
    folder.write(np.arange(2), np.zeros((2, 8, 8, 3), np.uint8))
    Image.new("RGB", (9, 9)).save(folder.path / "000001.png")
    with pytest.raises(ValueError, match=r"000001.png must be \(8, 8, 3\).*it is \(9, 9, 3\)"):
        folder.read([0, 1])
    (folder.path / "speed.json").touch()
    with pytest.raises(TextFileError, match="speed.json is not JSON"):
        _ = folder.speed
    (folder.path / "spec.json").write_text("")
    with pytest.raises(ValueError, match="has images of an unknown spec, not of .*: remove it"):
        ImageFolder(folder.path, {}, Classes(3))
    (tmp_path / "exact.npy").touch()
    with pytest.raises(ValueError, match="exact.npy is not an array, remove it"):
        kept(tmp_path / "exact.npy", lambda: np.zeros(1))


@pytest.fixture
def client(glyphs_server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(glyphs_server.grpc) as client:
        yield client


def test_the_service_makes_the_same_images(
    client: FlowTurboClient, engine: Engine, tmp_path: Path
) -> None:
    spec = SamplingSpec("H1P2", 3.0)
    folder = ImageFolder(tmp_path, {}, engine.subject)
    assert folder.fill(12, served(client, spec, engine.subject), batch=2, in_flight=4).images == 12
    seeds = np.arange(12)
    expected = engine.make(spec, seeds).image
    # Its batches are of other sizes, for which bfloat16 rounds otherwise.
    assert np.abs(folder.read(seeds).astype(int) - expected.astype(int)).mean() < 1
