"""Requests are checked at the edge, and errors say the value and what is allowed."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowturbo.conditions import REQUEST_OUTPUTS
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.errors import RequestError
from flowturbo.generate import complete, generate, program_for
from flowturbo.latents import noise
from flowturbo.pipeline import Defaults, ModelRecord, Pipeline
from flowturbo.presets import built_in
from flowturbo.request import GenerationRequest, named_pipeline, parse_request
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.grid import GridRule

pytestmark = pytest.mark.unit

CLASSES = ClassLabel(36, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
RECORD = ModelRecord(sizes={"C": 4, "h": 16, "w": 16})
PIPELINE = Pipeline(
    name="glyphs",
    condition=CLASSES,
    latent_shape=(4, 16, 16),
    models={
        Role.PREDICTOR: RECORD,
        Role.REFINER: RECORD,
        Role.DECODER: replace(RECORD, sizes={**RECORD.sizes, "H": 64, "W": 64}),
    },
)
LATENTS_ONLY = replace(
    PIPELINE, name="sit", condition=ClassLabel(36), models={Role.PREDICTOR: RECORD}
)
SETTINGS = Settings(max_images=8)
EVERYTHING = tuple(spec.name for spec in REQUEST_OUTPUTS)


def text(value: str | bytes) -> np.ndarray:
    return np.array([value if isinstance(value, bytes) else value.encode()], dtype=object)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def parse(outputs: tuple[str, ...] = ("image",), **tensors: np.ndarray) -> GenerationRequest:
    return parse_request(tensors, outputs, PIPELINE, SETTINGS)


def test_defaults_are_the_settings() -> None:
    request = parse(label=ints(3, 4))
    assert request.schedule == built_in()["fast"]
    assert request.times is None
    assert request.guidance.scale == SETTINGS.default_guidance_scale
    assert len(set(request.seeds.tolist())) == 2
    np.testing.assert_array_equal(request.noise(), noise(request.seeds, (4, 16, 16)))


def test_the_defaults_of_a_pipeline_come_before_the_settings() -> None:
    own = replace(PIPELINE, defaults=Defaults(schedule="H2", guidance_scale=3.0))
    request = parse_request({"label": ints(3)}, ["image"], own, SETTINGS)
    assert (str(request.schedule), request.guidance.scale) == ("H2", 3)
    asked = {"label": ints(3), "schedule": text("E4"), "guidance_scale": floats(2)}
    request = parse_request(asked, ["image"], own, SETTINGS)
    assert (str(request.schedule), request.guidance.scale) == ("E4", 2)


def test_class_names() -> None:
    assert parse(class_name=np.array([b"B", b"9"], object)).condition.tolist() == [1, 35]


def test_noise_depends_on_the_seed_alone() -> None:
    together = noise(ints(7, 8, 2**63 - 1), (4, 16, 16))
    np.testing.assert_array_equal(noise(ints(8), (4, 16, 16))[0], together[1])
    assert together.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(together.reshape(3, -1)) - np.eye(3)).max() < 0.1


def times(schedule: str, *values: float) -> dict[str, np.ndarray]:
    """The inputs of a request for one image on a grid of its own."""
    return {"label": ints(1), "schedule": text(schedule), "times": floats(*values)}


def test_a_request_may_give_its_time_grid() -> None:
    """Which need not be the whole of [0, 1], and is what the program runs on."""
    request = parse(**times("E2", 0.25, 0.5, 0.75))
    assert request.times == (0.25, 0.5, 0.75)
    program = program_for(request.schedule, Variant.REFERENCE, request.times)
    assert [(call.starts_at, call.lands_at) for call in program.calls] == [(0.25, 0.5), (0.5, 0.75)]
    # In place of the grid that the schedule's shift makes.
    assert parse(**times("E2@3", 0, 0.5, 1)).times == (0, 0.5, 1)


BAD: list[tuple[str, dict[str, np.ndarray]]] = [
    ("label must be 0 to 35, got 36", {"label": ints(36)}),
    ("label must be 0 to 35, got -1", {"label": ints(3, -1)}),
    ("1 to 8 images, got 0", {"label": ints()}),
    ("1 to 8 images, got 9", {"label": ints(*range(9))}),
    ("got neither", {"seed": ints(1)}),
    ("got both", {"label": ints(1), "class_name": text("A")}),
    ("'AB' is unknown, known are A, B", {"class_name": text("AB")}),
    ("UTF-8", {"class_name": text(b"\xff")}),
    ("label must be INT64, got float32", {"label": floats(1)}),
    (r"label must have shape \[n\], got \[1, 1\]", {"label": ints(1)[None]}),
    ("0 steps", {"label": ints(1), "schedule": text("H0")}),
    ("unknown step 'X'", {"label": ints(1), "schedule": text("H1P5R3X")}),
    ("guidance_scale must be .* got nan", {"label": ints(1), "guidance_scale": floats(np.nan)}),
    ("guidance_interval", {"label": ints(1), "guidance_interval": floats(0.5, 0.1)}),
    (r"shape \[2\], got \[3\]", {"label": ints(1), "guidance_interval": floats(0, 0, 1)}),
    ("one entry per image, 2 here, got 1", {"label": ints(1, 2), "seed": ints(1)}),
    ("seed must be 0 to", {"label": ints(1), "seed": ints(-5)}),
    (
        "either seed or initial_noise",
        {"label": ints(1), "seed": ints(1), "initial_noise": np.zeros((1, 4, 16, 16), np.float32)},
    ),
    (
        r"shape \[n, 4, 16, 16\], got \[1, 4, 8, 8\]",
        {"label": ints(1), "initial_noise": np.zeros((1, 4, 8, 8), np.float32)},
    ),
    (
        "finite",
        {"label": ints(1), "initial_noise": np.full((1, 4, 16, 16), np.nan, np.float32)},
    ),
    (
        "raw, png, jpeg, webp, png_base64, .*, got 'gif'",
        {"label": ints(1), "output_format": text("gif")},
    ),
    ("unknown input 'lable'", {"lable": ints(1)}),
    ("2 steps needs 3 times, got shape .2,", times("H2", 0, 1)),
    ("2 steps needs 3 times, got shape .4,", times("H2", 0, 0.2, 0.5, 1)),
    ("times must rise strictly, got 0.5 and then 0.5", times("H2", 0, 0.5, 0.5)),
    ("times must rise strictly, got 0.75 and then 0.5", times("H3", 0, 0.75, 0.5, 1)),
    ("times must be finite, got nan", times("H2", 0, np.nan, 1)),
    ("times must be finite, got inf", times("H2", 0, np.inf, np.inf)),
    (r"times must lie within \[0, 1\], got -0.5 to 1.0", times("H2", -0.5, 0.5, 1)),
    (r"times must lie within \[0, 1\], got 0.0 to 1.5", times("H2", 0, 0.5, 1.5)),
    (
        r"times must have shape \[n\], got \[1, 3\]",
        {"label": ints(1), "times": floats(0, 1, 2)[None]},
    ),
    ("times must be FP32, got int64", {"label": ints(1), "times": ints(0, 1)}),
    # The default schedule is H1P5R3: nine steps.
    ("9 steps needs 10 times", {"label": ints(1), "times": floats(0, 1)}),
]


@pytest.mark.parametrize(("said", "tensors"), BAD)
def test_refuses(said: str, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(RequestError, match=said):
        parse(**tensors)


def test_refuses_what_the_pipeline_lacks() -> None:
    label = {"label": ints(1)}
    with pytest.raises(RequestError, match="pipeline sit has no decoder.* ask for latent"):
        parse_request({**label, "schedule": text("H2")}, ["image"], LATENTS_ONLY, SETTINGS)
    with pytest.raises(RequestError, match="H1R2 has refiner steps, and pipeline sit has no ref"):
        parse_request({**label, "schedule": text("H1R2")}, ["latent"], LATENTS_ONLY, SETTINGS)
    with pytest.raises(RequestError, match="have no names"):
        parse_request({"class_name": text("A")}, ["latent"], LATENTS_ONLY, SETTINGS)


def test_a_request_names_its_pipeline() -> None:
    names = ["glyphs", "sit"]
    assert named_pipeline({}, names, "glyphs") == "glyphs"
    assert named_pipeline({"pipeline": text("sit")}, names, "glyphs") == "sit"
    # The one that serves it has been chosen by then.
    assert parse(label=ints(1), pipeline=text("glyphs")).images == 1


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        (text("glyfs"), "pipeline 'glyfs' is unknown, known are glyphs, sit$"),
        (text(""), "pipeline '' is unknown, known are glyphs, sit$"),
        (text("x" * 1000), f"pipeline '{'x' * 40}' is unknown"),
        (text(b"\xff"), "pipeline must be UTF-8 text"),
        (ints(1), "pipeline must be BYTES, got int64"),
        (np.array([b"sit", b"sit"], object), r"pipeline must have shape \[1\], got \[2\]"),
        (np.array([], object), r"pipeline must have shape \[1\], got \[0\]"),
    ],
)
def test_a_pipeline_that_is_not_installed_is_refused(pipeline: np.ndarray, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        named_pipeline({"pipeline": pipeline}, ["glyphs", "sit"], "glyphs")


def settings_of(of: Pipeline, settings: Settings, **tensors: np.ndarray) -> dict[str, Any]:
    """The answer `settings` to a request for one image."""
    request = parse_request({"label": ints(1), **tensors}, ["settings"], of, settings)
    (entry,) = complete(request, of, settings, {})["settings"]
    found: dict[str, Any] = json.loads(entry)
    return found


def test_settings_say_what_is_used() -> None:
    """The defaults of the service, those of the pipeline, and what the request gave."""
    found = settings_of(PIPELINE, SETTINGS)
    assert found == {
        "pipeline": "glyphs",
        "schedule": "H1P5R3",
        "times": None,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 1.0],
        "size": [64, 64],
        "variant": "reference",
        "output_format": "raw",
    }
    own = replace(LATENTS_ONLY, defaults=Defaults(guidance_scale=3.0), grid=GridRule(shift=2.0))
    assert settings_of(own, replace(SETTINGS, variant="paper")) == found | {
        "pipeline": "sit",
        "schedule": "H1P5@2",  # the preset without its refiner steps, on the pipeline's grid
        "guidance_scale": 3.0,
        "size": None,
        "variant": "paper",
    }
    # A preset of the pipeline's own, and its shift, are told as the schedule that they stand for.
    named = replace(own, own_presets={"quick": "A4"})
    assert settings_of(named, SETTINGS, schedule=text("quick"))["schedule"] == "A4@2"
    given = {
        **times("H2", 0, 0.25, 1),
        "guidance_scale": floats(2),
        "guidance_interval": floats(0.25, 0.5),
        "output_format": text("png"),
    }
    assert settings_of(PIPELINE, SETTINGS, **given) == found | {
        "schedule": "H2",
        "times": [0.0, 0.25, 1.0],
        "guidance_scale": 2.0,
        "guidance_interval": [0.25, 0.5],
        "output_format": "png",
    }


def test_settings_ask_for_the_same_again() -> None:
    """What is told can be given in the next request."""
    given = {**times("H1P1@3", 0, 0.25, 1), "guidance_interval": floats(0.1, 0.7)}
    told = settings_of(PIPELINE, SETTINGS, **given)
    again = {
        "pipeline": text(told["pipeline"]),
        "schedule": text(told["schedule"]),
        "times": floats(*told["times"]),
        "guidance_scale": floats(told["guidance_scale"]),
        "guidance_interval": floats(*told["guidance_interval"]),
        "output_format": text(told["output_format"]),
    }
    assert settings_of(PIPELINE, SETTINGS, **again) == told


def test_encoded_image_needs_a_format() -> None:
    with pytest.raises(RequestError, match="output_format png"):
        parse(("encoded_image",), label=ints(1))
    assert parse(("encoded_image",), label=ints(1), output_format=text("webp")).needs_decoder


def test_no_outputs_named_means_the_image_and_what_made_it() -> None:
    """Latents come unasked only from a pipeline without a decoder."""
    raw = parse(EVERYTHING, label=ints(1))
    assert raw.outputs == ("image", "seed", "class_name", "settings")
    png = parse(EVERYTHING, label=ints(1), output_format=text("png"))
    assert png.outputs == ("encoded_image", "seed", "class_name", "settings")
    request = parse_request({"label": ints(1)}, EVERYTHING, LATENTS_ONLY, SETTINGS)
    assert request.outputs == ("latent", "seed", "class_name", "settings")
    # Whoever names some gets these, in whatever number.
    others = ("encoded_image", "pipelines", "truncated")
    named = tuple(name for name in EVERYTHING if name not in others)
    assert parse(named, label=ints(1)).outputs == named


def test_no_outputs_named_is_answered_in_full() -> None:
    """With the latent of a pipeline that makes nothing else."""
    tensors = {"label": ints(1, 2), "seed": ints(7, 8), "schedule": text("E1")}
    request = parse_request(tensors, EVERYTHING, LATENTS_ONLY, SETTINGS)
    program = program_for(request.schedule, Variant.REFERENCE)

    def infer(role: Role, block: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        assert role is Role.PREDICTOR
        return block["x"], block["velocity"]

    answer = generate(request, LATENTS_ONLY, SETTINGS, program, infer)
    assert list(answer) == ["latent", "seed", "class_name", "settings"]
    np.testing.assert_array_equal(answer["latent"], noise(ints(7, 8), (4, 16, 16)))
    assert answer["seed"].tolist() == [7, 8]
    assert answer["class_name"].tolist() == [b"1", b"2"]  # ids, as there are no names
    assert json.loads(answer["settings"][0])["pipeline"] == "sit"


def test_outputs_keep_the_order_asked_for() -> None:
    assert parse(("seed", "image", "latent", "seed"), label=ints(1)).outputs == (
        *("seed", "image", "latent"),
    )


def test_networks_without_a_null_class_are_unguided() -> None:
    classes = replace(CLASSES, null_class=False)
    alone = replace(PIPELINE, condition=classes, defaults=Defaults(guidance_scale=3.0))

    def guidance(**tensors: np.ndarray) -> Any:
        label = {"label": ints(35)}
        return parse_request(label | tensors, ["latent"], alone, SETTINGS).guidance

    assert guidance().scale == 1 == alone.default_guidance_scale(SETTINGS)
    assert guidance(guidance_scale=floats(1)).scale == 1
    for scale in (0, 1.5, 3):
        with pytest.raises(RequestError, match=f"has no null class.* 1, got {scale}"):
            guidance(guidance_scale=floats(scale))
