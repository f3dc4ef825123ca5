"""Guidance rows against the plain formula."""

import numpy as np
import pytest

from flowturbo import Schedule, compile_program, sample
from flowturbo.errors import RequestError
from flowturbo.rows import Tensors, guided_block, to_images, to_rows
from flowturbo.solver.calls import BlockCall, Network, PredictorCall
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array, run_sync, sample_async

pytestmark = pytest.mark.unit

LABELS = np.array([[3], [5]], dtype=np.int64)
NULL = np.array([[9]], dtype=np.int64)
NOISE = np.random.default_rng(0).standard_normal((2, 4, 2, 2)).astype(np.float32)


def velocity(x: Array, t: Array, label: Array) -> Array:
    return np.sin(x * (1 + label[:, :, None, None]) + t[:, None, None, None])


async def served_block(network: Network, tensors: Tensors) -> tuple[Array, Array]:
    """The step block's contract, all channels guided, in numpy."""
    x, v = tensors["x"], tensors["velocity"]
    t, euler, w_prev, w_next, scale = tensors["scalars"].T
    pair = tensors["pair"][:, 0]
    rows = np.arange(len(x))
    partner = np.clip(rows + pair, 0, len(x) - 1)
    cond, uncond = np.where(pair < 0, partner, rows), np.where(pair > 0, partner, rows)
    wide = [column[:, None, None, None] for column in (euler, w_prev, w_next, scale)]
    out = velocity((x + wide[0] * v)[cond], t, tensors["label"])
    v_next = out[uncond] + wide[3] * (out[cond] - out[uncond])
    return x + wide[1] * v + wide[2] * v_next, v_next


def plain(schedule: str, guidance: Guidance) -> Array:
    """The same samples, guided one image at a time without rows."""

    def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        assert isinstance(call, PredictorCall)
        t = np.full(len(x), call.t, dtype=np.float32)
        x_in = x + np.float32(call.euler) * v
        v_next = velocity(x_in, t, LABELS)
        if guidance.applies_at(call.t):
            u = velocity(x_in, t, np.repeat(NULL, len(x), axis=0))
            v_next = u + np.float32(guidance.scale) * (v_next - u)
        return x + np.float32(call.w_prev) * v + np.float32(call.w_next) * v_next, v_next

    return sample(compile_program(Schedule.parse(schedule)), NOISE, block)


def null_of(guidance: Guidance) -> Tensors:
    """The unconditional value, which a request without guidance does not give."""
    return {"label": NULL} if guidance.enabled else {}


@pytest.mark.parametrize("schedule", ["H3", "P4", "A5", "H1P2E2"])
@pytest.mark.parametrize(
    "guidance", [Guidance(1.0), Guidance(2.5), Guidance(0.0), Guidance(3.0, (0.3, 0.7))]
)
def test_rows_equal_the_formula(schedule: str, guidance: Guidance) -> None:
    block = guided_block(served_block, {"label": LABELS}, null_of(guidance), guidance)
    program = compile_program(Schedule.parse(schedule))
    rows = run_sync(sample_async(program, to_rows(NOISE, guidance), block))
    np.testing.assert_allclose(to_images(rows, guidance), plain(schedule, guidance), atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (Guidance(1.0), [2] * 4),
        (Guidance(2.0), [4] * 4),
        (Guidance(2.0, (0.5, 1.0)), [2, 2, 4, 4]),
    ],
)
def test_unguided_evaluations_cost_half(guidance: Guidance, rows: list[int]) -> None:
    seen: list[int] = []

    async def evaluate(network: Network, tensors: Tensors) -> tuple[Array, Array]:
        assert {len(tensor) for tensor in tensors.values()} == {len(tensors["x"])}
        seen.append(len(tensors["x"]))
        return tensors["x"], tensors["velocity"]

    block = guided_block(evaluate, {"label": LABELS}, null_of(guidance), guidance)
    run_sync(sample_async(compile_program(Schedule.parse("E4")), to_rows(NOISE, guidance), block))
    assert seen == rows


@pytest.mark.parametrize("scale", [-0.1, 101, float("nan"), float("inf")])
def test_refuses_scale(scale: float) -> None:
    with pytest.raises(RequestError, match="guidance_scale must be"):
        Guidance(scale)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1)])
def test_refuses_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(RequestError, match="guidance_interval must be"):
        Guidance(2.0, interval)
