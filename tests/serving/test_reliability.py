"""Processes that die under load: every request is answered, and right. Counted, never timed."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient, Update

from bench.faults import DEADLINE_S, SAME_LEVELS, Answered, judged, markdown, served

CLIENTS, REQUESTS = 4, 8


RESTART = "a requested restart"
VICTIMS = ["glyphs_velocity_predictor", "flowturbo", "tritonserver", RESTART]


@pytest.mark.parametrize("victim", VICTIMS)
def test_every_request_outlasts_a_process_that_dies(
    glyphs_repository: Path, tmp_path: Path, victim: str
) -> None:
    with served(glyphs_repository, tmp_path / "log") as server:
        with FlowTurboClient(server.grpc) as client:
            images = client.generate(list(range(REQUESTS)), list(range(REQUESTS))).images
        assert images is not None
        known = images.astype(int)
        under_way, killed = threading.Barrier(CLIENTS + 1), threading.Event()
        off: list[float] = []

        def ask() -> None:
            with FlowTurboClient(server.grpc, timeout_s=120) as client:
                for seed in range(REQUESTS):
                    if seed == 2:
                        under_way.wait()
                        killed.wait()
                    made = client.generate([seed], [seed]).images
                    assert made is not None
                    off.append(float(np.abs(made[0].astype(int) - known[seed]).mean()))

        clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for client_thread in clients:
            client_thread.start()
        under_way.wait()
        if victim == RESTART:
            killed.set()
            server.restart()  # requests in flight end, later ones wait for the new server
        else:
            os.kill(server.processes()[victim], signal.SIGKILL)
            killed.set()
        for client_thread in clients:
            client_thread.join()
        assert len(off) == CLIENTS * REQUESTS  # none lost
        assert max(off) <= SAME_LEVELS  # none wrong


def test_a_requested_stop_lets_requests_finish(glyphs_repository: Path, tmp_path: Path) -> None:
    """Without another attempt: the request is asked once, and the stop comes in its middle."""
    with served(glyphs_repository, tmp_path / "log") as server:
        streamed: list[Update] = []
        under_way = threading.Event()

        def ask() -> None:
            with FlowTurboClient(server.grpc, retries=0) as client:
                for update in client.stream([1] * 16, seeds=list(range(16)), schedule="H16"):
                    streamed.append(update)
                    under_way.set()

        asking = threading.Thread(target=ask)
        asking.start()
        under_way.wait(60)
        server.restart()
        asking.join(60)
        assert streamed[-1].final and not streamed[0].final
        last = streamed[-1].images
        with FlowTurboClient(server.grpc) as client:
            again = client.generate([1] * 16, list(range(16)), "H16").images
        assert last is not None and again is not None
        off = np.abs(last.astype(int) - again).mean((1, 2, 3))
        assert off.max() <= SAME_LEVELS


def test_what_a_fault_did() -> None:
    """Ten answers per second before and after, two seconds of silence, and three bad ones."""
    before = [Answered(k / 10 - 0.1, k / 10, "right") for k in range(1, 40)]
    after = [Answered(6 + k / 10 - 0.1, 6 + k / 10, "right") for k in range(100)]
    bad = [Answered(4.0, 6.5, "wrong"), Answered(4.0, 5.0 + DEADLINE_S, "ServerBusyError")]
    late = Answered(4.0, 7.0 + DEADLINE_S, "DeadlineExceededError")
    found = judged("model", "kill -9", [*before, *after, *bad, late], 0.0, 4.0, 16.0)
    assert (found.right, found.wrong, found.overdue) == (100, 1, 1)
    assert found.failed == {"ServerBusyError": 1, "DeadlineExceededError": 1}
    assert found.silent_s == pytest.approx(2.0) and found.full_speed_s == pytest.approx(
        2.0, abs=0.2
    )
    report = markdown({"hardware": {"cpu": "one"}, "outcomes": [vars(found)]})
    assert (
        "| model | kill -9 | 100 | 1 | 1 ServerBusyError, 1 DeadlineExceededError | 1 |" in report
    )
