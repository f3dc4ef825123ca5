"""Editing, inpainting and inversion on flows whose solution is known, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowturbo.conditions import REQUEST_OUTPUTS
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.editing import EDGE_WEIGHT, FILL_NOISE, OpenEdit, inner_weights, repainting
from flowturbo.errors import CancelledError, RequestError
from flowturbo.generate import generate, program_for
from flowturbo.holes import continued
from flowturbo.latents import noise
from flowturbo.pipeline import ModelRecord, Pipeline
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.rows import Tensors
from flowturbo.settings import Settings
from flowturbo.solver.calls import BlockCall, Variant
from flowturbo.solver.grid import GridRule, time_grid
from flowturbo.solver.program import compile_program
from flowturbo.solver.sampler import run_sync, sample_async
from flowturbo.solver.schedule import Schedule

pytestmark = pytest.mark.unit

RECORD = ModelRecord(sizes={"C": 4, "h": 16, "w": 16})
WITH_IMAGE = replace(RECORD, sizes={**RECORD.sizes, "H": 64, "W": 64})
PIPELINE = Pipeline(
    name="glyphs",
    condition=ClassLabel(36),
    latent_shape=(4, 16, 16),
    models={
        Role.PREDICTOR: RECORD,
        Role.REFINER: RECORD,
        Role.DECODER: WITH_IMAGE,
        Role.ENCODER: WITH_IMAGE,
    },
)
SETTINGS = Settings(max_images=8, default_guidance_scale=1.0)
EVERYTHING = tuple(spec.name for spec in REQUEST_OUTPUTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
HALF = np.zeros((1, 64, 64), np.uint8)
HALF[:, :, 32:] = 255
LABELS = np.arange(2)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def parse(
    outputs: tuple[str, ...] = ("image", "latent"), pipeline: Pipeline = PIPELINE, **tensors: Any
) -> GenerationRequest:
    given = {"label": LABELS, "seed": LABELS + 5, **tensors}
    given = {name: value for name, value in given.items() if value is not None}
    return parse_request(given, outputs, pipeline, SETTINGS)


def affine(x: np.ndarray, t: float) -> np.ndarray:
    """The velocity of data that are N(0.7, 0.4^2): the map from noise to data is affine."""
    variance = (1 - t) ** 2 + (t * 0.4) ** 2
    return np.asarray(0.7 + (t * 0.16 - (1 - t)) / variance * (x - t * 0.7))


def infer(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
    """Networks of known functions: an encoder that averages, and a decoder that repeats."""
    if role is Role.ENCODER:
        rows = tensors["image"].reshape(-1, 16, 4, 16, 4, 3).mean((2, 4))
        latent = np.concatenate([rows, rows[..., :1]], -1).transpose(0, 3, 1, 2) / 127.5 - 1
        return (latent.astype(np.float32),)
    if role is Role.DECODER:
        levels = (tensors["latent"][:, :3] + 1) * 127.5
        pixels = levels.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
        return pixels.repeat(4, 1).repeat(4, 2), np.ones((len(levels), 1), np.float32)
    t, euler, w_prev, w_next, _ = (tensors["scalars"][:1, k] for k in range(5))
    x, v = tensors["x"], tensors["velocity"]
    v_next = affine(x + euler * v, float(t[0])).astype(np.float32)
    return x + w_prev * v + w_next * v_next, v_next


def run(request: GenerationRequest) -> Tensors:
    program = program_for(request.schedule, Variant.REFERENCE, request.times)
    return generate(request, PIPELINE, SETTINGS, program, infer)


@pytest.mark.parametrize("schedule", ["E6", "H3", "H1P5", "A6@3", "H1P3Z1@2", "A4T2", "M5"])
def test_strength_one_is_plain_generation(schedule: str) -> None:
    given = {"schedule": np.array([schedule.encode()], object)}
    plain = run(parse(**given))
    edited = run(parse(**given, image=IMAGES, strength=floats(1.0)))
    np.testing.assert_array_equal(edited["latent"], plain["latent"])
    np.testing.assert_array_equal(edited["image"], plain["image"])


def test_an_edit_starts_between_noise_and_image() -> None:
    """With one Euler step from t: x + (1 - t) v(x, t), x = (1 - t) n + t z."""
    request = parse(schedule=np.array([b"E1"], object), image=IMAGES, strength=floats(0.25))
    assert request.start_time == pytest.approx(0.75)
    (z,) = infer(Role.ENCODER, {"image": IMAGES})
    x = 0.25 * noise(LABELS + 5, (4, 16, 16)) + 0.75 * z
    np.testing.assert_allclose(
        run(request)["latent"], x + 0.25 * affine(x, 0.75), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("shift", "start"), [(1.0, 0.4), (3.0, 1 - 3 * 0.6 / (1 + 2 * 0.6))])
def test_strength_is_a_share_of_the_unshifted_grid(shift: float, start: float) -> None:
    """0.6 at shift 3 is a share of noise of 0.82: as in diffusers."""
    pipeline = replace(PIPELINE, grid=GridRule(shift=shift))
    request = parse(pipeline=pipeline, image=IMAGES, strength=floats(0.6))
    assert request.times and len(request.times) == len(request.schedule) + 1
    assert request.times[0] == pytest.approx(start) and request.times[-1] == 1
    settings = request.settings(pipeline, SETTINGS)["edit"]
    assert settings == {"start_time": request.times[0], "strength": pytest.approx(0.6)}


def test_the_grid_of_an_edit_may_be_given() -> None:
    times = floats(0.5, 0.75, 1.0)
    request = parse(schedule=np.array([b"E2"], object), image=IMAGES, times=times)
    assert request.start_time == 0.5


@pytest.mark.parametrize("schedule", ["E6", "H3", "H1P5", "A6@3", "H1P3Z1@2", "A4T2", "M5"])
def test_inpainting_keeps_what_is_not_masked(schedule: str) -> None:
    request = parse(schedule=np.array([schedule.encode()], object), image=IMAGES, mask=HALF)
    made = run(request)
    np.testing.assert_array_equal(made["image"][:, :, :32], IMAGES[:, :, :32])
    assert np.abs(made["image"][:, :, 40:].astype(int) - IMAGES[:, :, 40:]).mean() > 10
    (z,) = infer(Role.ENCODER, {"image": IMAGES})
    # One cell beside the mask is repainted too.
    np.testing.assert_allclose(made["latent"][..., :7], z[..., :7], atol=1e-6)
    assert (np.abs(made["latent"][..., 7:] - z[..., 7:]) > 1e-3).mean() > 0.9


@pytest.mark.parametrize(("schedule", "order"), [("H{}", 2), ("H1P{}", 2), ("A{}", 2), ("M{}", 2)])
def test_inpainting_keeps_the_order_of_convergence(schedule: str, order: int) -> None:
    """The field mixes both regions, so an inconsistent cached velocity would show."""
    rng = np.random.default_rng(3)
    start, data = rng.standard_normal((2, 1, 1, 8, 8))
    masks = np.zeros((1, 1, 8, 8), bool)
    masks[..., 4:] = True

    def mixed(x: np.ndarray, t: float) -> np.ndarray:
        return affine(x, t) + 0.5 * np.sin(np.roll(x, 1, -1) + np.roll(x, -1, -1))

    async def block(call: BlockCall, x: Any, v: Any) -> tuple[np.ndarray, np.ndarray]:
        row = call.scalars(lambda t: 1.0)
        v_next = mixed(x + row.euler * v, call.t)  # type: ignore[union-attr]
        return x + row.w_prev * v + row.w_next * v_next, v_next  # type: ignore[union-attr]

    def solved(text: str) -> np.ndarray:
        program = compile_program(Schedule.parse(text))
        return run_sync(sample_async(program, start, block, repainting(masks, start, data)))

    exact = solved("H250")
    errors = [np.abs(solved(schedule.format(n)) - exact).max() for n in (16, 32)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize(
    ("schedule", "at_most"),
    [("E32", 0.1), ("H16", 0.01), ("P32", 0.01), ("A32", 0.02), ("M32", 0.005)],
)
def test_an_inversion_leads_back(schedule: str, at_most: float) -> None:
    """To the noise, and from it to the image."""
    text = np.array([schedule.encode()], object)
    request = parse(("latent",), seed=None, schedule=text, image=IMAGES, invert=np.array([True]))
    assert request.times == time_grid(len(request.schedule))[::-1]
    assert request.guidance.scale == 1 and request.seeds.tolist() == [0, 0]
    found = run(request)["latent"]
    back = run(parse(("latent",), seed=None, schedule=text, initial_noise=found))["latent"]
    (z,) = infer(Role.ENCODER, {"image": IMAGES})
    assert np.sqrt(np.mean((back - z) ** 2)) < at_most


def test_outputs_of_edits() -> None:
    plain = parse(EVERYTHING)
    assert plain.outputs == ("image", "seed", "class_name", "settings")
    assert parse(EVERYTHING, image=IMAGES).outputs == (
        *("image", "seed", "start_time", "class_name", "settings"),
    )
    inverted = parse(EVERYTHING, seed=None, image=IMAGES, invert=np.array([True]))
    assert inverted.outputs == ("latent", "seed", "start_time", "class_name", "settings")


def test_a_mask_reaches_every_cell_that_it_touches() -> None:
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 5, 9] = True
    image = np.zeros((1, 16, 16, 3), np.uint8)
    found = OpenEdit(image, mask, 0, 4).latent_masks
    assert found.shape == (1, 1, 4, 4)
    want = np.zeros((4, 4), bool)
    want[0:3, 1:4] = True  # the cell (1, 2) and its neighbours
    np.testing.assert_array_equal(found[0, 0], want)


@pytest.mark.parametrize("feather", [0, 1, 4, 200])
def test_feather_is_inside_the_mask(feather: int) -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    weights = inner_weights(mask, feather)
    assert (weights[~mask] == 0).all() and weights.max() == 1
    middle = weights[16]
    depth = min(feather + 1, 8)  # the deepest pixels are 8 from the border
    np.testing.assert_allclose(middle[8 : 8 + depth], np.arange(1, depth + 1) / depth)


def test_a_filled_hole_has_no_feather() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    want = np.zeros((9, 9), np.float32)
    want[2:7, 2:7] = EDGE_WEIGHT
    want[3:6, 3:6] = 1
    np.testing.assert_array_equal(inner_weights(mask, None), want)
    edits = [parse(image=IMAGES, mask=HALF, **more).edit for more in ({}, {"strength": floats(1)})]
    assert [edit.feather for edit in edits if edit] == [None, 4]


@pytest.mark.parametrize("schedule", ["H1P5", "A6@3", "H4@0.5"])
def test_a_hole_is_filled_first(schedule: str) -> None:
    """It starts with the same share of noise on every grid, and not from what is masked."""
    text = np.array([schedule.encode()], object)
    request = parse(schedule=text, image=IMAGES, mask=HALF)
    assert request.start_time == pytest.approx(1 - FILL_NOISE)
    assert request.settings(PIPELINE, SETTINGS)["edit"]["fill"] is True
    assert request.edit
    opened = request.edit.open()
    np.testing.assert_array_equal(opened.images[:, :, :32], IMAGES[:, :, :32])
    other = np.where(HALF[..., None] > 0, 255 - IMAGES, IMAGES)
    again = run(parse(schedule=text, image=other, mask=HALF))
    np.testing.assert_array_equal(again["image"], run(request)["image"])


def test_with_a_strength_a_hole_keeps_its_content() -> None:
    request = parse(image=IMAGES, mask=HALF, strength=floats(0.5))
    assert request.edit and request.start_time == pytest.approx(0.5)
    np.testing.assert_array_equal(request.edit.open().images, IMAGES)


def test_new_pixels_meet_those_beside_the_mask() -> None:
    """A decoded image that is brighter everywhere leaves no seam."""
    own = np.full((1, 32, 32, 3), 100, np.uint8)
    mask = np.zeros((1, 32, 32), bool)
    mask[:, :, 16:] = True
    edit = OpenEdit(own, mask, 4, 4)
    np.testing.assert_array_equal(edit.pasted(own + 40), own)


def test_values_continue_smoothly() -> None:
    """Constants stay constants; between two colours all lie between them; a hole is exact."""
    known = np.zeros((33, 47), bool)
    known[:, :5] = known[:, -5:] = True
    values = np.zeros((33, 47, 1))
    values[:, -5:] = 100
    found = continued(values, known)
    np.testing.assert_array_equal(found[known], values[known])
    row = found[16, :, 0]
    assert (np.diff(row) >= -1e-3).all() and 20 < row[23] < 80
    np.testing.assert_allclose(continued(values * 0 + 7, known), 7, rtol=1e-5)
    assert (continued(values, known & False) == 0).all()


def test_the_edge_of_the_image_is_no_border() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    assert (inner_weights(mask, 1)[:, 5:] == 1).all()


IMAGE = {"image": IMAGES}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask": HALF}, "mask needs an image: give image or image_file"),
    ({"strength": floats(0.5)}, "strength needs an image"),
    ({"invert": np.array([True])}, "invert needs an image"),
    ({**IMAGE, "image_file": np.array([b"x"], object)}, "give either image or image_file"),
    ({"image_file": np.array([b"x"], object)}, "image_file must be a whole file of"),
    ({**IMAGE, "mask": HALF, "mask_file": np.array([b"x"], object)}, "give either mask or"),
    ({"image": IMAGES[:0]}, "image must have one entry, or one per image, 2 here, got 0"),
    ({"image": np.repeat(IMAGES, 2, 0)}, "one per image, 2 here, got 4"),
    ({"image": IMAGES[..., :2]}, r"image must have shape \[n, n, n, 3\]"),
    ({"image": IMAGES.astype(np.float32)}, "image must be UINT8, got float32"),
    ({"image": IMAGES[:, :0]}, "image must have pixels"),
    (
        {**IMAGE, "mask": HALF[:, :32]},
        r"mask must have the size of its image, 64 x 64, got 64 x 32",
    ),
    ({**IMAGE, "mask": HALF.astype(bool)}, "mask must be UINT8, got bool"),
    ({**IMAGE, "strength": floats(0)}, "strength must be 0.001 to 1, got 0"),
    ({**IMAGE, "strength": floats(1.1)}, "strength must be 0.001 to 1, got 1.1"),
    ({**IMAGE, "strength": floats(np.nan)}, "strength must be 0.001 to 1, got nan"),
    ({**IMAGE, "strength": floats(0.5), "times": floats(0.5, 1)}, "give either strength or times"),
    ({**IMAGE, "feather": np.array([2])}, "feather needs mask or mask_file"),
    ({**IMAGE, "mask": HALF, "feather": np.array([-1])}, "feather must be 0 to 256 pixels, got -1"),
    ({**IMAGE, "invert": np.array([True])}, "invert leads from .* and takes no seed"),
    (
        {**IMAGE, "invert": np.array([True]), "seed": None, "strength": floats(0.5)},
        "takes no strength",
    ),
    ({**IMAGE, "invert": np.array([True]), "seed": None}, "ask for latent, not for an image"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse(**given)


def test_an_inversion_takes_no_refiner() -> None:
    with pytest.raises(RequestError, match="H1P5R3.* leave R out"):
        parse(
            ("latent",),
            seed=None,
            schedule=np.array([b"H1P5R3"], object),
            image=IMAGES,
            invert=np.array([True]),
        )
    with pytest.raises(RequestError, match="H1P5R3.* leave R out"):
        compile_program(Schedule.parse("H1P5R3"), time_grid(9)[::-1])


@pytest.mark.parametrize(("level", "said"), [(0, "black everywhere"), (255, "white everywhere")])
def test_a_mask_without_a_border_is_refused_when_it_is_read(level: int, said: str) -> None:
    request = parse(image=IMAGES, mask=np.full_like(HALF, level))
    with pytest.raises(RequestError, match=said):
        run(request)


def test_all_of_an_image_may_be_repainted_with_a_strength() -> None:
    everything = {"image": IMAGES, "mask": np.full_like(HALF, 255), "strength": floats(1)}
    np.testing.assert_array_equal(run(parse(**everything))["latent"], run(parse())["latent"])


def test_files_are_decoded_one_after_the_other_as_long_as_it_matters() -> None:
    """A request that has expired or been left decodes no more."""
    request = parse(image=IMAGES, mask=HALF)
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise CancelledError("gone")

    assert request.edit
    with pytest.raises(CancelledError):
        request.edit.open(check)


def test_a_pipeline_without_an_encoder_takes_no_image() -> None:
    models = {role: of for role, of in PIPELINE.models.items() if role is not Role.ENCODER}
    with pytest.raises(RequestError, match="glyphs has no encoder for images and takes no image"):
        parse(pipeline=replace(PIPELINE, models=models), image=IMAGES)
