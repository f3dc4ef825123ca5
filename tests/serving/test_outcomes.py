"""Whatever goes wrong is told in a sentence, under the right code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flowturbo import errors
from flowturbo.contract import Role, model_name
from flowturbo.serving.forwarded import Forwarded, as_asked, caller_of, find_patterns
from flowturbo.serving.outcomes import CODES, as_told, failure, incomplete, outcome_of

pytestmark = pytest.mark.unit

PREDICTOR = model_name("glyphs", Role.PREDICTOR)
DECODER = model_name("glyphs", Role.DECODER)


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (errors.RequestError("label must be 0 to 35, got 36"), "invalid", "label must be"),
        (errors.BusyError("server is full"), "busy", "server is full"),
        (errors.DeadlineError("the deadline passed"), "deadline", "the deadline passed"),
        (errors.CancelledError("gone"), "cancelled", "gone"),
        (errors.NotFiniteError("the image is not finite"), "error", "the image is not finite"),
        (raised(lambda: {}["x_next"]), "error", "(KeyError: 'x_next'); its log has the details"),
        (raised(lambda: [][0]), "error", "(IndexError: list index out of range)"),
        (ValueError(), "error", "failed on this request (ValueError: no reason given)"),
        (MemoryError(), "unavailable", "out of memory (MemoryError"),
        (
            RuntimeError("Failed to increase the shared memory pool size for key x"),
            "unavailable",
            "shared memory may be too small",
        ),
    ],
)
def test_errors_are_sentences(error: Exception, outcome: str, said: str) -> None:
    assert outcome_of(error) == outcome
    told = str(as_told(error))
    assert said in told
    assert "\n" not in told and "internal error," not in told


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            failure(PREDICTOR, f"Stub process '{PREDICTOR}_0_0' is not healthy."),
            "UNAVAILABLE",
            f"{PREDICTOR} cannot answer, its process has ended or hangs (Stub process 'glyphs_vel",
        ),
        (
            failure(DECODER, "CUDA error: out of memory"),
            "UNAVAILABLE",
            f"{DECODER} has no memory for this request (CUDA error: out of memory)",
        ),
        (
            failure("glyphs_h1p5r3", f"in ensemble: Stub process '{DECODER}_0_0' has ended"),
            "UNAVAILABLE",
            f"{DECODER} cannot answer, its process has ended or hangs",
        ),
        (
            failure(DECODER, str(as_told(MemoryError()))),
            "UNAVAILABLE",
            f"{DECODER}: the server is out of memory (MemoryError: no reason given): ask for",
        ),
        (
            failure(DECODER, "ONNX Runtime: Failed to allocate memory for a buffer"),
            "UNAVAILABLE",
            f"{DECODER} has no memory for this request",
        ),
        (
            failure(DECODER, "Error when running inference: Server not ready"),
            "UNAVAILABLE",
            "the server is stopping or starting (Error when running inference: Server not ready)",
        ),
        (
            failure(DECODER, "Server is stopping, scheduler for model has stopped accepting new"),
            "UNAVAILABLE",
            "the server is stopping or starting",
        ),
        (failure(DECODER, "bad shape"), "INTERNAL", f"{DECODER}: bad shape"),
        (
            failure(DECODER, "CUDA execution provider is not available in this build"),
            "INTERNAL",
            f"{DECODER}: CUDA execution provider is not available",
        ),
        (
            failure(DECODER, "the kernel requires more shared memory than the GPU has"),
            "INTERNAL",
            f"{DECODER}: the kernel requires more shared memory",
        ),
        (
            failure(DECODER, f"Request for model '{DECODER}' version 1 is not ready"),
            "UNAVAILABLE",
            f"{DECODER} cannot answer",
        ),
        (
            failure(DECODER, "message: KeyError: 'x'\n\nAt:\n  /opt/m.py(46): execute\n"),
            "INTERNAL",
            f"{DECODER}: message: KeyError: 'x'",
        ),
        (
            # A pipeline's name may end as the process of an instance does.
            failure("x", "Stub process 'sit_1_2_vae_decoder_0_0' is not healthy."),
            "UNAVAILABLE",
            "sit_1_2_vae_decoder cannot answer",
        ),
        (
            incomplete(PREDICTOR, ["x_next", "velocity_next"]),
            "UNAVAILABLE",
            f"{PREDICTOR} answered without x_next, velocity_next, as happens when its",
        ),
    ],
)
def test_models_that_fail(error: errors.FlowTurboError, code: str, said: str) -> None:
    assert CODES[outcome_of(error)] == code
    assert str(as_told(error)).startswith(said)
    assert "\n" not in str(error) and "execute" not in str(error)


def test_an_answer_has_no_error() -> None:
    assert outcome_of({"image": 1}) == "ok"


def test_the_caller_is_named_by_a_header() -> None:
    assert caller_of({"FlowTurbo-Caller": "alice", "x": 1}) == "alice"  # HTTP keeps the letters
    assert caller_of({"flowturbo-caller": "x" * 1000}) == "x" * 100
    assert caller_of({}) == ""


def test_forwarded_headers_are_those_of_the_servers_flags() -> None:
    arguments = ["tritonserver", "--http-header-forward-pattern=(?i)x-request-id|traceparent"]
    arguments += ["--grpc-header-forward-pattern", "^baggage$", "--log-verbose=1"]
    assert find_patterns(arguments) == ["(?i)x-request-id|traceparent", "^baggage$"]
    assert find_patterns(["tritonserver", "--grpc-header-forward-pattern"]) == []
    forwarded = Forwarded(find_patterns(arguments))
    # The server finds a pattern anywhere in a name.
    for name in ("traceparent", "X-Request-ID", "my-traceparent-2", "baggage"):
        assert name in forwarded
    for name in ("schedule", "baggage2", ""):
        assert name not in forwarded
    assert "schedule" not in Forwarded([])
    assert find_patterns([]) == []
    # Of RE2's syntax, not of Python's, or something else there.
    for pattern in (r"\pN", "^x-[[:alnum:]]+$"):
        assert "schedule" in Forwarded([pattern])


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (["--http-header-forward-pattern="], [""]),
        (["--http-header-forward-pattern", ""], [""]),
        (["--http-header-forward=x-trace"], ["x-trace"]),
        (["--grpc-he", "x-trace"], ["x-trace"]),
        (["--http=1", "--grpc-h=1", "--http-header-forward-patterns=x"], []),
    ],
)
def test_flags_are_read_as_the_server_reads_them(arguments: list[str], patterns: list[str]) -> None:
    found = find_patterns(["tritonserver", *arguments])
    assert found == patterns
    assert ("anything" in Forwarded(found)) == (patterns == [""])


@pytest.mark.parametrize("server", [1, 7])
def test_the_server_is_found_above_a_process(tmp_path: Path, server: int) -> None:
    """Also as process 1, where a container starts with it; without one nothing is forwarded."""
    command = ["/opt/tritonserver/bin/tritonserver", "--http-header-forward-pattern=x-id"]
    for process, parent, words in ((9, 8, ["stub"]), (8, server, ["sh"]), (server, 0, command)):
        (tmp_path / str(process)).mkdir()
        (tmp_path / f"{process}/cmdline").write_text("".join(f"{word}\0" for word in words))
        (tmp_path / f"{process}/stat").write_text(f"{process} (a) b) S {parent} 1 1")
    assert "x-id" in Forwarded.by_server(9, tmp_path)
    (tmp_path / f"{server}/cmdline").write_text("init\0")
    assert "x-id" not in Forwarded.by_server(9, tmp_path)
    assert "x-id" not in Forwarded.by_server(10, tmp_path)


def test_the_order_of_outputs_is_told_in_parameters() -> None:
    """By numbers that rise from one request to the next."""
    stated = {"flowturbo_output_seed": 40, "flowturbo_output_image": 41}
    assert Forwarded([]).check(lambda: json.dumps(stated)) == stated
    assert as_asked(["image", "seed"], stated) == ["seed", "image"]
    assert as_asked(["image", "latent"], {}) == ["image", "latent"]
    with pytest.raises(errors.RequestError, match="unknown request parameter 'flowturbo_output_a'"):
        Forwarded([]).check(lambda: '{"flowturbo_output_a": "first"}')


def test_parameters_that_are_no_text() -> None:
    def parameters() -> str:
        return b'{"x-bin": "\xff\xfe", "x-id": "a\tb"}'.decode()

    Forwarded(["^x-"]).check(parameters)
    Forwarded([]).check(lambda: "")
    with pytest.raises(errors.RequestError, match="unknown request parameter 'x-bin'"):
        Forwarded(["^x-id"]).check(parameters)
