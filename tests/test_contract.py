"""Everybody who names a tensor names the same: the contract, the configurations, the client."""

from pathlib import Path

import numpy as np
import pytest
from flowturbo_client import protocol
from support import check_tensors, read_config

from flowturbo.conditions import REQUEST_INPUTS, REQUEST_OUTPUTS
from flowturbo.contract import (
    CALLER_HEADER,
    LABEL_ROLES,
    ORCHESTRATOR,
    STREAM,
    STREAM_INPUTS,
    STREAM_OUTPUTS,
    Role,
    model_name,
    run_inputs,
)
from flowturbo.errors import RepositoryError
from flowturbo.pipeline import read_pipeline
from flowturbo.settings import Settings

MODEL_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"


def test_orchestrator() -> None:
    config = read_config(MODEL_REPOSITORY / "flowturbo" / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert not config.model_transaction_policy.decoupled
    assert [group.count for group in config.instance_group] == [1]
    check_tensors(config.input, REQUEST_INPUTS, {"C": -1, "h": -1, "w": -1})
    check_tensors(config.output, REQUEST_OUTPUTS, {})
    Settings.load(MODEL_REPOSITORY)


def test_names_of_models() -> None:
    """Which stand in metrics, logs and configurations: they must not change."""
    assert [model_name("glyphs", role) for role in LABEL_ROLES] == [
        *("glyphs_velocity_predictor", "glyphs_velocity_refiner", "glyphs_vae_decoder"),
    ]


def test_stream() -> None:
    """As the orchestrator, with many answers, and no settings of its own."""
    one, many = (
        read_config(MODEL_REPOSITORY / name / "config.pbtxt") for name in (ORCHESTRATOR, STREAM)
    )
    assert many.name == STREAM and many.model_transaction_policy.decoupled
    check_tensors(many.input, (*REQUEST_INPUTS, *STREAM_INPUTS), {"C": -1, "h": -1, "w": -1})
    check_tensors(many.output, (*REQUEST_OUTPUTS, *STREAM_OUTPUTS), {})
    assert not many.parameters and many.instance_group == one.instance_group


@pytest.mark.parametrize("role", (*LABEL_ROLES, Role.ENCODER))
def test_composed(role: Role, glyphs_repository: Path) -> None:
    pipeline = read_pipeline(glyphs_repository, "glyphs")
    config = read_config(glyphs_repository / pipeline.model(role) / "config.pbtxt")
    assert config.name == model_name("glyphs", role)
    inputs, outputs = pipeline.tensors(role)
    sizes = {"C": 4, "h": 16, "w": 16, "H": 64, "W": 64}
    check_tensors(config.input, run_inputs(inputs), sizes)
    check_tensors(config.output, outputs, sizes)
    assert config.HasField("dynamic_batching")
    assert config.max_batch_size == pipeline.max_rows


def test_client() -> None:
    assert protocol._CONTRACT.keys() == {spec.name for spec in REQUEST_OUTPUTS}
    for spec in REQUEST_OUTPUTS:
        dtype, dims = protocol._CONTRACT[spec.name]
        assert (dtype, len(dims)) == (spec.dtype, len(spec.dims))
    assert protocol.CALLER_HEADER == CALLER_HEADER
    noise = np.zeros((1, 4, 2, 2), dtype=np.float32)
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    every = {"seeds": 1, "schedule": "H1", "guidance_scale": 2.0, "guidance_interval": (0, 1)}
    every |= {"pipeline": "glyphs", "times": (0, 1), "output_format": "jpeg"}
    every |= {"output_quality": 90, "strip_metadata": True}
    requests = [
        protocol.build_request(prompts="a", negative_prompts="b", size="32x16"),
        protocol.build_request(prompts="a", prompts_to="b", mix=[0.5]),
        protocol.build_request("A", **every),
        protocol.build_request(1, initial_noise=noise),
        protocol.build_request(1, image=b"file", mask=b"file", strength=0.5, feather=1),
        protocol.build_request(1, image=pixels, mask=pixels[..., 0], invert=True),
        protocol.pipelines_request(),
    ]
    sent = {tensor.name(): tensor for request in requests for tensor in request.inputs}
    specs = {spec.name: spec for spec in REQUEST_INPUTS}
    assert sent.keys() == specs.keys()
    for name, tensor in sent.items():
        assert (
            tensor.datatype()
            == {
                np.int64: "INT64",
                np.float32: "FP32",
                np.uint8: "UINT8",
                np.bool_: "BOOL",
                np.object_: "BYTES",
            }[specs[name].dtype]
        )
        assert len(tensor.shape()) == len(specs[name].dims)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"max_inflght": "3"}, "unknown parameter 'max_inflght', known are default_pipeline"),
        ({"max_inflight": "many"}, "max_inflight must be int, got 'many'"),
        ({"max_inflight": "0"}, "max_inflight must be above 0, got 0"),
        ({"caller_weights": "alice"}, "caller_weights must be like 'alice=3,bob=0.5', got 'alice'"),
        ({"caller_weights": "alice=0"}, "the share of 'alice' must be above 0, got 0"),
        ({"caller_weights": "alice=nan"}, "the share of 'alice' must be above 0, got nan"),
        ({"default_schedule": "R3"}, "no velocity cached"),
        ({"default_guidance_scale": "nan"}, "guidance_scale must be"),
        ({"variant": "fast"}, "'fast' is not a valid Variant"),
    ],
)
def test_settings_are_checked(parameters: dict[str, str], said: str) -> None:
    with pytest.raises(RepositoryError, match=said):
        Settings.from_parameters(parameters)
