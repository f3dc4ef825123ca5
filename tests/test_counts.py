"""A guard that counts what the service does per image, so that batching cannot vanish unseen.

Counts do not depend on how fast a machine is; those under load are bounds, with room for chance.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from flowturbo_client import FlowTurboClient
from support import Caller

from bench.observe import Observation, Work, observing, read_work
from flowturbo.contract import LABEL_ROLES, ORCHESTRATOR, Role
from flowturbo.ensemble import runs
from flowturbo.generate import generate
from flowturbo.local import LocalPipeline
from flowturbo.pipeline import read_pipeline
from flowturbo.request import parse_request
from flowturbo.rows import Tensors
from flowturbo.serving.tritonserver import ServerAddress
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule

ON_STEPS, ON_ENSEMBLE = "H2P4R2", "H1P5R3"  # make export has an ensemble for the second
GUIDED = 2  # rows per image


def observed(url: str, schedules: tuple[str, ...], clients: int, requests: int) -> Observation:
    """What the server did for `requests` requests of one image from each of `clients`."""
    with FlowTurboClient(url) as client, ThreadPoolExecutor(clients) as pool:

        def loop(start: int) -> None:
            for schedule in islice(cycle(schedules), start, start + requests):
                client.generate(3, 1, schedule)

        with observing(url, "glyphs") as observer:
            list(pool.map(loop, range(clients)))
    return observer.observation


def calls_of(url: str, model: str) -> Work:
    with triton.InferenceServerClient(url) as client:
        return read_work(client, model)


@pytest.mark.parametrize("schedule", [ON_STEPS, ON_ENSEMBLE])
def test_a_lone_image_costs_its_program(
    glyphs_server: ServerAddress, glyphs_repository: Path, schedule: str
) -> None:
    """Every block call of its program once, and one of the decoder.

    An ensemble makes calls in a row in one execution.
    """
    images = 3
    time.sleep(1.1)  # after company, requests are gathered for a while
    done = observed(glyphs_server.grpc, (schedule,), clients=1, requests=images).models
    program = compile_program(Schedule.parse(schedule))
    made = runs(program, read_pipeline(glyphs_repository, "glyphs"))
    for role in (Role.PREDICTOR, Role.REFINER):
        executions = [run for run in made if Role(run[0].network) is role]
        of_image = len(executions) if schedule == ON_ENSEMBLE else sum(map(len, executions))
        calls, work = of_image * images, done[role]
        assert (work.calls, work.executions, work.rows) == (calls, calls, calls * GUIDED)
    decoder = done[Role.DECODER]
    assert (decoder.calls, decoder.executions, decoder.rows) == (images,) * 3


def test_an_ensemble_is_one_call(glyphs_server: ServerAddress) -> None:
    model = "glyphs_h1p5r3"
    time.sleep(1.1)  # after company, requests are gathered for a while
    before = calls_of(glyphs_server.grpc, model)
    observed(glyphs_server.grpc, (ON_ENSEMBLE,), clients=1, requests=3)
    assert (calls_of(glyphs_server.grpc, model) - before).calls == 3


@pytest.mark.parametrize("schedules", [("H20",), ("H20R3", "P39R1", "E40", "A40")], ids=str)
def test_requests_share_batches(glyphs_server: ServerAddress, schedules: tuple[str, ...]) -> None:
    """8 requests that are there at a time have 16 rows; 2 are those of one request alone.

    They come together and are long: how fast machine and callers are matters little.
    """
    with Caller(glyphs_server.grpc) as caller, observing(glyphs_server.grpc, "glyphs") as observer:
        begun = [
            caller.begin(ORCHESTRATOR, ["latent"], label=np.array([3]), schedule=schedule)
            for schedule in islice(cycle(schedules), 8)
        ]
        for each in begun:
            each.result()
    assert observer.observation.models[Role.PREDICTOR].rows_per_execution >= 5


def test_bytes_that_a_step_moves(glyphs_repository: Path) -> None:
    """What goes into a block call and comes out of it is the contract's, once, and nothing else."""
    local = LocalPipeline(glyphs_repository)
    sizes = dict(zip("Chw", local.pipeline.latent_shape, strict=True))
    moved: dict[Role, list[int]] = {role: [] for role in LABEL_ROLES}

    def infer(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
        outputs = local._infer(role, tensors)
        moved[role].append(sum(a.nbytes for a in (*tensors.values(), *outputs)))
        return outputs

    request = parse_request(
        {"label": np.array([3]), "seed": np.array([1])}, ["latent"], local.pipeline, local.settings
    )
    program = compile_program(Schedule.parse("H1P5R3"))
    generate(request, local.pipeline, local.settings, program, infer)
    for role, count in ((Role.PREDICTOR, 7), (Role.REFINER, 3), (Role.DECODER, 0)):
        specs = [spec for side in local.pipeline.tensors(role) for spec in side]
        per_row = sum(
            np.dtype(s.dtype).itemsize * int(np.prod([sizes.get(str(d), d) for d in s.dims]))
            for s in specs
            if role is not Role.DECODER
        )
        assert moved[role] == [GUIDED * per_row] * count
