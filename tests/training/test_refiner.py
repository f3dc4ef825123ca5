"""A refiner's training: what is drawn, where it is cut short, how it is shared, what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from support import GOLDEN, ROOT, golden_cases, rewrite
from torch import Tensor

from flowturbo.nets.checkpoint import build_network, infer_config
from flowturbo.nets.sit import ByLabel, SiT, SiTConfig
from flowturbo.nets.weights import load_checkpoint
from flowturbo.solver.calls import Network
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.schedule import Schedule
from training.data import InMemory, Latents
from training.loop import exclusive, save_weights
from training.objective import RefinerObjective, Rule, regression_loss
from training.plan import PlanError, TrainingConfig
from training.refiner import main
from training.samples import RefinerPreview, sample_latents, tile

CLASSES = 3
CONFIG = SiTConfig(4, 2, 4, 4, 4, 32, 2, 2, num_classes=CLASSES)
SOURCE = InMemory(Latents(torch.randn(64, 4, 4, 4), torch.arange(64) % CLASSES))


def predictor() -> SiT:
    torch.manual_seed(0)
    model = SiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor, and latents in two shards as `training.latents` writes them."""
    folder = tmp_path_factory.mktemp("refiner")
    save_weights(predictor(), folder / "predictor.safetensors")
    write_shards(folder / "latents", torch.arange(48) % CLASSES)
    return folder


SETTINGS = {"settings": "of no importance either"}


def write_shards(folder: Path, label: Tensor, shape: Sequence[int] = (4, 4, 4)) -> None:
    folder.mkdir(parents=True)
    generator, shards = torch.Generator().manual_seed(1), []
    for k, part in enumerate(label.chunk(2)):
        name = f"shard-{k:05d}.safetensors"
        mean = torch.randn((len(part), *shape), generator=generator).half()
        tensors = {"mean": mean, "std": torch.full_like(mean, 0.1), "label": part.clone()}
        save_file(tensors, folder / name, SETTINGS)
        shards.append({"file": name, "count": len(part)})
    index = {"latent_shape": list(shape), "vae": "of no importance here", "shards": shards}
    index["settings"] = SETTINGS["settings"]
    index["class_names"] = [str(k) for k in range(CLASSES)]
    (folder / "index.json").write_text(json.dumps(index))


def arguments(data: Path, out: Path, *more: str, latents: str = "latents") -> list[str]:
    given = {
        "predictor": data / "predictor.safetensors",
        "data": data / latents,
        "out": out / "refiner.safetensors",
        "runs": out,
        "num-heads": 2,
        "steps": 40,
        "batch": 6,
        "log-every": 1,
        "learning-rate": 1e-3,
        "sample-every": 0,
    }
    return [word for k, v in given.items() for word in (f"--{k}", str(v))] + list(more)


def launch(*program: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a program, by what `accelerate launch` starts those of several GPUs with."""
    options = ("--nproc-per-node", "2", "--standalone")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def losses(out: Path) -> list[tuple[int, float]]:
    progress = json.loads((out / "refiner.json").read_text())
    return [*map(tuple, progress["losses"]), (progress["step"], progress["smooth_loss"])]


@pytest.mark.parametrize("low", [0.0, 0.06])
def test_the_paper_draws_a_step_for_each_row(low: float) -> None:
    draws = RefinerObjective(Rule.PAPER, low, 0.12).draw(
        4000, SOURCE, torch.Generator().manual_seed(0)
    )
    assert draws.step.min() > low
    assert draws.step.max() <= 0.12
    assert draws.step.mean() == pytest.approx((low + 0.12) / 2, abs=2e-3)
    assert draws.t.min() >= 0
    assert (draws.t + draws.step).max() <= 1
    assert draws.dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert draws.row.unique().numel() == len(SOURCE)


def test_the_public_code_draws_one_step_for_the_batch() -> None:
    objective, steps, last = RefinerObjective(Rule.REFERENCE), [], []
    for seed in range(300):
        draws = objective.draw(64, SOURCE, torch.Generator().manual_seed(seed))
        assert draws.step.unique().numel() == 1
        steps.append(float(draws.step[0]))
        last.append(float((draws.t + draws.step).max()))
    assert 0 <= min(steps) < 0.01
    assert 0.11 < max(steps) < 0.12
    assert max(last) > 1


@pytest.mark.parametrize("guided", [3, 4])
def test_a_guided_step_is_what_sampling_takes(guided: int) -> None:
    """The state moves with the conditional row's velocity, on channels without guidance too."""
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """1 without a label, 2 with one, at first; then 5, whatever the label."""
        seen.append(x)
        return torch.ones_like(x) * (
            1.0 + (label != CLASSES).float()[:, None, None, None] if len(seen) < 3 else 5.0
        )

    def refiner(read: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(read)
        return torch.zeros_like(read[:, :4])

    objective = RefinerObjective(smallest_scale=3.0, largest_scale=3.0, guided_channels=guided)
    draws = objective.draw(200, SOURCE, torch.Generator().manual_seed(0))
    data = SOURCE.read(draws.row)
    loss = regression_loss(objective, network, refiner, CLASSES, data, draws)  # type: ignore[arg-type]
    x, _, x_next, read = seen
    moved = ((x_next - x) / draws.step[:, None, None, None]).mean((0, 2, 3))
    expected = torch.tensor([4.0] * guided + [2.0] * (4 - guided))
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)
    dropped, own = draws.dropped, read[:, 4 + guided :]
    assert (read[:, 4 : 4 + guided] == 4.0).all()  # 1 + 3 * (2 - 1)
    assert (own[dropped] == 1.0).all() and (own[~dropped] == 2.0).all()
    share = dropped.float().mean()
    assert loss == pytest.approx(float(share * (5 - 1) ** 2 + (1 - share) * (5 - 2) ** 2))


@pytest.mark.parametrize(("rule", "first_is_dropped"), [("paper", True), ("reference", False)])
def test_what_the_networks_see(rule: str, first_is_dropped: bool) -> None:
    """Eq. 6, and which of the evaluations have the null label."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            seen.append((x, t, label))
            return torch.full_like(x[:, :4], float(len(seen)))

    draws = RefinerObjective(Rule(rule)).draw(200, SOURCE, torch.Generator().manual_seed(0))
    data = SOURCE.read(draws.row)
    loss = regression_loss(RefinerObjective(Rule(rule)), Spy(), Spy(), CLASSES, data, draws)
    (x, t, first), (x_next, t_next, second), (read, t_refined, third) = seen
    at, step = draws.t[:, None, None, None], draws.step[:, None, None, None]
    torch.testing.assert_close(x, (1 - at) * draws.noise + at * data.mean)
    torch.testing.assert_close(x_next, x + step * 1.0)  # the predictor answered 1
    torch.testing.assert_close(read, torch.cat([x_next, torch.ones_like(x)], 1))
    assert torch.equal(t, draws.t)
    assert torch.equal(t_next, draws.t + draws.step)
    assert torch.equal(t_refined, t_next)
    assert torch.equal(first.eq(CLASSES), draws.dropped & first_is_dropped)
    assert torch.equal(second.eq(CLASSES), draws.dropped)
    assert torch.equal(second, third)
    assert torch.equal(second[~draws.dropped], data.label[~draws.dropped])
    assert loss == (3 - (2 - 1)) ** 2


def test_latents_are_drawn_from_their_posterior() -> None:
    mean, std = torch.randn(2, 4, 4, 4), torch.rand(2, 4, 4, 4)
    noise = torch.randn(2, 4, 4, 4)
    label = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(Latents(mean, label, std).sample(noise), mean + std * noise)
    assert torch.equal(Latents(mean, label).sample(noise), mean)


KILLED = """
import os, signal, sys
from training import loop, refiner

step = loop._step

def step_or_die(*arguments):
    if arguments[-1] == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)

loop._step = step_or_die
refiner.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, and the same command again."""
    assert main(arguments(data, tmp_path / "whole")) == 0
    command = arguments(data, tmp_path / "killed", "--save-every-s", "0")
    killed_in_step_18 = [sys.executable, "-c", KILLED, *command]
    done = subprocess.run(killed_in_step_18, cwd=ROOT, timeout=600)
    assert done.returncode == -signal.SIGKILL
    state = tmp_path / "killed" / "refiner.state.pt"
    assert torch.load(state, weights_only=True)["progress"]["step"] == 17
    assert main(command) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (
        load_checkpoint(tmp_path / name / "refiner.safetensors").tensors
        for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_two_processes_agree_with_one(data: Path, tmp_path: Path) -> None:
    """Also on which latents are left out, of a shard that one of them looks at."""
    write_shards(tmp_path / "latents", torch.arange(48) % CLASSES)
    path = tmp_path / "latents" / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["mean"][2] = torch.inf
    rewrite(path, tensors)
    exact = ("--precision", "fp32", "--sample-every", "40", "--skip-bad")
    exact = (*exact, "--data", str(tmp_path / "latents"))
    assert main(arguments(data, tmp_path / "one", *exact)) == 0
    done = launch("-m", "training.refiner", *arguments(data, tmp_path / "two", *exact))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ema weights after 40 steps") == 1  # two that agree, not two alone
    assert "47 images (1 skipped)" in done.stdout
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-3)
    assert one[0][1] != one[-1][1]
    tensors = [
        load_checkpoint(tmp_path / name / "refiner.safetensors").tensors for name in ("one", "two")
    ]
    for key, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], value, atol=1e-4, rtol=1e-2)


def test_processes_whose_folders_differ_are_told(data: Path, tmp_path: Path) -> None:
    """Runs on a disk of its own for each: one goes on from a state, the other finds none."""
    assert main(arguments(data, tmp_path / "0", "--steps", "4")) == 0
    own = tmp_path / "own_disk.py"
    own.write_text(
        "import os, sys\nfrom training.refiner import main\n"
        f"sys.exit(main([*sys.argv[1:], '--runs', f'{tmp_path}/{{os.environ[\"RANK\"]}}']))\n"
    )
    done = launch(str(own), *arguments(data, tmp_path, "--steps", "6"))
    assert done.returncode != 0
    for process in range(2):
        said = f"refiner (process {process} of 2): {tmp_path / str(process)} must be a folder that"
        assert said in done.stderr
    assert "of steps 4, 0" in done.stderr
    assert not (tmp_path / "1" / "refiner.state.pt").exists()


def test_a_loss_that_is_no_number_is_told_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a predictor whose velocities overflow."""
    model = predictor()
    torch.nn.init.constant_(model.final_layer.linear.bias, 3e38)
    save_weights(model, tmp_path / "predictor.safetensors")
    more = ("--predictor", str(tmp_path / "predictor.safetensors"))
    assert main(arguments(data, tmp_path, *more)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("refiner: loss is ") and said.endswith("at step 0")


def test_a_predictor_without_a_null_class(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row keeps its label; guidance, which needs the null class, is refused."""
    torch.manual_seed(0)
    unguided = SiT(replace(CONFIG, null_class=False))
    save_weights(unguided, tmp_path / "predictor.safetensors")
    common = ("--predictor", str(tmp_path / "predictor.safetensors"), "--steps", "3")
    for option, asked in (("--train-guidance", ("1", "2")), ("--guidance-scale", ("1.5",))):
        assert main(arguments(data, tmp_path, *common, option, *asked)) == 2
        said = capsys.readouterr().err
        assert f"has no null class: {option} must be 1, got {' '.join(asked)}" in said
    assert main(arguments(data, tmp_path, *common, "--sample-every", "2")) == 0
    made = load_checkpoint(tmp_path / "refiner.safetensors")
    assert made.integers("num_classes") == [CLASSES]
    assert not infer_config(made, reads_velocity=True).null_class


def test_a_batch_that_cannot_be_shared() -> None:
    plan = TrainingConfig(1, 18, 1e-3, seed=0)
    with pytest.raises(PlanError, match="multiple of the 4 processes, such as 16, 20; got 18"):
        plan.check_processes(4)
    plan.check_processes(3)


def test_a_refiner_of_another_size(data: Path, tmp_path: Path) -> None:
    size = ("--depth", "2", "--width", "48", "--heads", "3", "--steps", "2")
    assert main(arguments(data, tmp_path, *size, "--objective", "reference")) == 0
    checkpoint = load_checkpoint(tmp_path / "refiner.safetensors")
    config = infer_config(checkpoint, reads_velocity=True)
    assert (config.depth, config.width, config.num_heads, config.in_channels) == (2, 48, 3, 8)
    assert checkpoint.metadata["objective"] == "reference"
    build_network(checkpoint, reads_velocity=True)


def test_which_weights_are_written(data: Path, tmp_path: Path) -> None:
    """Twice the command: the second time nothing is left to train."""
    for weights in ("ema", "model"):
        assert main(arguments(data, tmp_path, "--out-weights", weights)) == 0
        tensors = load_checkpoint(tmp_path / "refiner.safetensors").tensors
        state = torch.load(tmp_path / "refiner.state.pt", weights_only=True)
        held = {"ema": state["average"], "model": state["model"]}[weights]
        prefix = "module." if weights == "ema" else ""
        assert all(torch.equal(tensors[key], held[prefix + key]) for key in tensors)
    # An average over the last of 40 steps, not one with the first weights, which answer nothing.
    name = "final_layer.linear.weight"
    ratio = state["average"][f"module.{name}"].norm() / state["model"][name].norm()
    assert 0.5 < ratio < 1


def sampled(
    networks: list[Any], x: Tensor, label: Tensor, program: Program, scale: float, guided: int
) -> Tensor:
    """Latents of the classes `label`, from a predictor and a refiner."""
    null = torch.full_like(label, networks[0].config.num_classes)
    by_label = dict(zip(Network, map(ByLabel, networks), strict=True))
    return sample_latents(by_label, x, [label[:, None]], [null[:, None]], program, scale, guided)


def test_sampling_is_that_of_the_public_code() -> None:
    networks = [
        build_network(load_checkpoint(GOLDEN / f"{name}.pt"), reads_velocity=reads, num_heads=2)
        for name, reads in (("predictor", False), ("refiner", True))
    ]
    for case in golden_cases():
        program = compile_program(Schedule.parse(case.schedule))
        noise, label = torch.from_numpy(case.noise), torch.from_numpy(case.label)
        with torch.no_grad():
            latent = sampled(networks, noise, label, program, case.guidance_scale, 3)
        np.testing.assert_allclose(latent.numpy(), case.latent, atol=2e-5)


@pytest.mark.parametrize("guided", [3, 4])
def test_samples_on_a_shifted_grid(guided: int) -> None:
    """Of the velocity 3 t^2, twice that with a label: trapezoids from 0 to 1/4 to 1."""

    class Squares(torch.nn.Module):
        config = CONFIG

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            velocity = 3 * t**2 * (1.0 + (label != CLASSES))
            return velocity[:, None, None, None].expand(-1, 4, 4, 4)

    moved = 0.25 / 2 * 3 / 16 + 0.75 / 2 * (3 / 16 + 3)
    x, label = torch.zeros(2, 4, 4, 4), torch.zeros(2, dtype=torch.int64)
    network: Any = Squares()
    program = compile_program(Schedule.parse("H2@3"))
    latent = sampled([network, network], x, label, program, 3.0, guided)
    expected = moved * torch.tensor([4.0] * guided + [2.0] * (4 - guided))
    torch.testing.assert_close(latent.mean((0, 2, 3)), expected)


def test_pictures_while_training(data: Path, tmp_path: Path) -> None:
    """Files, and TensorBoard's, of the averaged refiner; the same picture for the same weights."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(arguments(data, tmp_path, "--sample-every", "20")) == 0
    with Image.open(tmp_path / "refiner" / "0000040.png") as file:
        picture = np.asarray(file)
    assert picture.shape == (4 * 16, 4 * 16, 3)
    network = build_network(load_checkpoint(tmp_path / "refiner.safetensors"), reads_velocity=True)
    preview = RefinerPreview(predictor(), every=20)
    assert np.array_equal(preview(network), picture)
    events = EventAccumulator(str(tmp_path / "refiner"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [20, 40]
    assert [round(e.value, 5) for e in events.Scalars("loss")] == [
        pytest.approx(loss, abs=1e-5) for _, loss in losses(tmp_path)[:-1]
    ]


@pytest.mark.parametrize("channels", [1, 2])
def test_pictures_of_few_channels(channels: int) -> None:
    torch.manual_seed(0)
    few = replace(CONFIG, in_channels=channels, latent_channels=channels, out_channels=channels)
    preview = RefinerPreview(SiT(few), every=1, images=4, guided_channels=channels)
    assert preview(SiT(replace(few, in_channels=2 * channels))).shape == (2 * 16, 2 * 16, 3)


def test_tiles() -> None:
    images = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    assert tile(images)[::2, ::2, 0].tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--step-range", "0.2", "0.1"), "0 <= smallest < largest <= 1, got 0.2 to 0.1"),
        (("--learning-rate", "0"), "learning_rate must be above 0, got 0.0"),
        (("--seed", "9" * 14), f"seed must be from 0 to 10000000000000, got {'9' * 14}"),
        (("--ema-decay", "1"), "ema_decay must be from 0 to below 1, got 1.0"),
        (("--out", "refiner.pt"), "--out must be a file that ends in .safetensors, got refiner.pt"),
        (("--out", "{folder}"), "--out must be a file that ends in .safetensors"),
        (("--width", "96"), "--width 96 needs --heads: heads are known only for 384"),
        (("--width", "30", "--heads", "4"), "--heads, got width 30, heads 4"),
        (("--sample-schedule", "R3"), "no velocity cached"),
        (("--sample-schedule", "X4"), "unknown step 'X'"),
        (("--guidance-channels", "5"), "--guidance-channels must be 1 to 4, got 5"),
        (("--guidance-scale", "nan"), "guidance scale must be 0 to 100, got nan"),
        (("--flip",), "--flip is for images"),
        (("--vae", "nowhere"), "no config.json"),
        (("--predictor", "nowhere.pt"), "nowhere.pt does not exist"),
    ],
)
def test_what_is_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    said: str,
) -> None:
    # On GPUs it waits for all processes, of which only this one may have failed.
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda _: pytest.fail("it waits"))
    (tmp_path / "folder.safetensors").mkdir()
    more = tuple(word.format(folder=tmp_path / "folder.safetensors") for word in more)
    assert main(arguments(data, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "refiner.state.pt").exists()


@pytest.mark.parametrize("name", ["refiner.state.pt", "refiner.json", "out/refiner.safetensors"])
def test_a_full_disk_is_told_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".partial").symlink_to("/dev/full")
    out = ("--out", str(tmp_path / "out" / "refiner.safetensors"))
    assert main(arguments(data, tmp_path, *out, "--steps", "1")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"refiner: [Errno 28] No space left on device: '{path}'"
    assert not path.exists()
    assert not path.with_suffix(".partial").is_symlink()


def test_a_large_state_on_a_full_disk(data: Path, tmp_path: Path) -> None:
    """Larger than what is held before it is written, so that it is cut in its middle."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    program = (
        f"{limited}from training.refiner import main; import sys; sys.exit(main(sys.argv[1:]))"
    )
    command = arguments(data, tmp_path, "--steps", "1", "--width", "128", "--heads", "2")
    done = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True
    )
    path = tmp_path / "refiner.state.pt"
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"refiner: [Errno 27] File too large: '{path}'"
    assert not [*tmp_path.glob("*.partial")]


def test_a_folder_in_use_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by the processes of a launcher that was killed."""
    with exclusive(tmp_path):
        assert main(arguments(data, tmp_path, "--steps", "1")) == 2
    assert f"{tmp_path} is in use by another run" in capsys.readouterr().err
    assert main(arguments(data, tmp_path, "--steps", "1")) == 0


def test_a_run_does_not_go_on_with_other_latents(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same names, number and shape."""
    write_shards(tmp_path / "latents", torch.arange(48) % CLASSES)
    given = ("--steps", "2", "--data", str(tmp_path / "latents"))
    assert main(arguments(data, tmp_path, *given)) == 0
    path = tmp_path / "latents" / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["mean"][0] *= 2
    rewrite(path, tensors)
    assert main(arguments(data, tmp_path, *given)) == 2
    assert "was trained with data of other content" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "other"])
def test_a_damaged_state_is_told_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert main(arguments(data, tmp_path, "--steps", "1")) == 0
    state = tmp_path / "refiner.state.pt"
    if damage == "other":
        torch.save({"plan": {}}, state)
    else:
        state.write_bytes(
            {"empty": b"", "text": b"no state", "cut": state.read_bytes()[:-100]}[damage]
        )
    assert main(arguments(data, tmp_path, "--steps", "1")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"refiner: {state} is not a state of a run, remove it: ")


def test_a_run_that_is_done_has_its_losses(data: Path, tmp_path: Path) -> None:
    """Also when it was killed between its last state and them."""
    assert main(arguments(data, tmp_path, "--steps", "2")) == 0
    path = tmp_path / "refiner.json"
    text = path.read_text()
    path.unlink()
    assert main(arguments(data, tmp_path, "--steps", "2")) == 0
    assert path.read_text() == text


def test_a_run_is_made_longer(data: Path, tmp_path: Path) -> None:
    for name, runs in {"whole": (9,), "parts": (4, 9)}.items():
        for steps in runs:
            assert main(arguments(data, tmp_path / name, "--steps", str(steps))) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_state_of_other_settings_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, tmp_path, "--steps", "2")) == 0
    assert main(arguments(data, tmp_path, "--steps", "2", "--objective", "reference")) == 2
    assert "was trained with" in capsys.readouterr().err


def test_training_goes_on_from_a_refiner(data: Path, tmp_path: Path) -> None:
    """With no step worth speaking of, it comes out as it went in; a misfit is refused."""
    assert main(arguments(data, tmp_path / "first", "--steps", "3")) == 0
    first = tmp_path / "first" / "refiner.safetensors"
    more = ("--start", str(first), "--steps", "1", "--learning-rate", "1e-12", "--heads", "2")
    assert main(arguments(data, tmp_path / "second", *more)) == 0
    one, other = (
        load_checkpoint(tmp_path / name / "refiner.safetensors").tensors
        for name in ("first", "second")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name])


def test_weights_of_a_checkpoint_that_holds_both(data: Path, tmp_path: Path) -> None:
    """Of the public training script, with twice the channels; both roles say which they take."""

    def write(name: str, models: dict[str, SiT]) -> str:
        torch.save({k: m.state_dict() for k, m in models.items()}, tmp_path / name)
        return str(tmp_path / name)

    def network(seed: int, **changes: int) -> SiT:
        torch.manual_seed(seed)
        model = SiT(replace(CONFIG, **changes))
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
        return model

    model, ema = (network(seed, out_channels=8) for seed in (1, 2))
    both = write("predictor.pt", {"model": model, "ema": ema})
    only = str(tmp_path / "predictor.safetensors")
    save_weights(ema, Path(only))
    starts = {"model": network(3, in_channels=8), "ema": network(4, in_channels=8)}
    start = ("--start", write("start.pt", starts), "--start-weights", "ema")
    common = ("--steps", "1", "--learning-rate", "1e-12", *start)
    found = {}
    for name, more in {
        "both": ("--predictor", both),
        "ema": ("--predictor", only),
        "model": ("--predictor", both, "--weights", "model"),
    }.items():
        assert main(arguments(data, tmp_path / name, *common, *more)) == 0
        found[name] = losses(tmp_path / name)
    assert found["both"] == found["ema"] != found["model"]
    tensors = load_checkpoint(tmp_path / "both" / "refiner.safetensors").tensors
    for key, tensor in starts["ema"].state_dict().items():
        torch.testing.assert_close(tensors[key], tensor)


def test_a_start_that_does_not_fit_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--start", str(GOLDEN / "refiner.pt"), "--heads", "2")
    assert main(arguments(data, tmp_path, *more)) == 2
    assert "the refiner has latent_size 8, the predictor has 4" in capsys.readouterr().err


def test_a_run_is_not_taken_for_another(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of fewer steps than it has made, from another start, or from one with a depth of its own."""
    assert main(arguments(data, tmp_path, "--steps", "4")) == 0
    start = ("--start", str(tmp_path / "refiner.safetensors"))
    for more in (("--steps", "3"), (*start, "--steps", "4")):
        assert main(arguments(data, tmp_path, *more)) == 2
        assert "was trained with" in capsys.readouterr().err
    assert main(arguments(data, tmp_path / "other", *start, "--depth", "2")) == 2
    assert "omit --depth and --width" in capsys.readouterr().err
