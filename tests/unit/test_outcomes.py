"""Whatever goes wrong is told in a sentence, under the right code."""

from collections.abc import Callable

import pytest

from flowturbo import errors
from flowturbo.serving.forwarded import Forwarded, find_patterns
from flowturbo.serving.outcomes import CODES, as_told, failure, incomplete, outcome_of


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
            failure("velocity_predictor", "Stub process 'velocity_predictor_0_0' is not healthy."),
            "UNAVAILABLE",
            "velocity_predictor cannot answer, its process has ended or hangs (Stub process 'vel",
        ),
        (
            failure("vae_decoder", "CUDA error: out of memory"),
            "UNAVAILABLE",
            "vae_decoder has no memory for this request (CUDA error: out of memory)",
        ),
        (failure("vae_decoder", "bad shape"), "INTERNAL", "vae_decoder: bad shape"),
        (
            incomplete("velocity_predictor", ["x_next", "velocity_next"]),
            "UNAVAILABLE",
            "velocity_predictor answered without x_next, velocity_next, as happens when its",
        ),
    ],
)
def test_models_that_fail(error: errors.FlowTurboError, code: str, said: str) -> None:
    assert CODES[outcome_of(error)] == code
    assert str(as_told(error)).startswith(said)


def test_an_answer_has_no_error() -> None:
    assert outcome_of({"image": 1}) == "ok"


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
    assert "schedule" in Forwarded([r"\pN"])  # of RE2's syntax, not of Python's
