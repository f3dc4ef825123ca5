"""The scheduler in the simulator, against what is known to be possible; nothing here is timed."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from bench.capacity.replica import Replica
from bench.capacity.simulation import Arrival, Simulation
from flowturbo.errors import BusyError, DeadlineError
from flowturbo.serving.scheduling import MANY_IMAGES_SHARE, MIN_ROWS, Need, Scheduler, Times

ROWS = 64
# Milliseconds at 0 to 64 rows: a fixed part, and a part per row.
PREDICTOR = tuple(2.0 + 0.55 * rows for rows in range(ROWS + 1))
DECODER = tuple(2.0 + 1.25 * rows for rows in range(ROWS + 1))
H8 = (("predictor", 2),) * 16 + (("decoder", 1),)
BULK, SMALL = 64, 1
STEP_S = max(PREDICTOR[ROWS], DECODER[ROWS]) / 1e3


def replica(**settings: float) -> Replica:
    times = {"predictor": PREDICTOR, "decoder": DECODER}
    return Replica(H8, times, 0.0, ROWS, turns=True, **{"max_inflight": 1000} | settings)  # type: ignore[arg-type]


def alone_s(images: int) -> float:
    """How long a request takes that has the server for itself."""
    simulation = Simulation(replica())
    simulation.at(0.0, lambda: simulation.arrive(Arrival(images)))
    simulation.run()
    ((arrived, end, _),) = simulation.answered
    return (end - arrived) / 1e3


def warm() -> Simulation:
    """A server that has seen all kinds of calls before."""
    simulation = Simulation(replica())
    for images in (1, 2, 4, 8, 16, 64):
        for _ in range(5):
            simulation.at(simulation.now, partial(simulation.arrive, Arrival(images)))
            simulation.run()
    simulation.answered.clear()
    return simulation


def closed_loop(simulation: Simulation, clients: Iterator[Arrival], until_s: float) -> None:
    """Each of `clients` asks again as soon as it has its answer."""
    waiting: Counter[Arrival] = Counter()

    def again() -> None:
        _, _, asked = simulation.answered[-1]
        if waiting[asked] and simulation.now < until_s * 1e3:
            simulation.arrive(asked)

    simulation.on_done = again
    for client in clients:
        waiting[client] += 1
        simulation.at(0.0, partial(simulation.arrive, client))


def images_of(simulation: Simulation, until_s: float) -> Counter[str]:
    made: Counter[str] = Counter()
    for _, end, asked in simulation.answered:
        if end <= until_s * 1e3:
            made[asked.caller] += asked.images
    return made


@pytest.mark.parametrize("deadline_s", [3.0, 7.0, 20.0, 60.0])
def test_as_many_large_requests_are_answered_as_fit(deadline_s: float) -> None:
    """All come at once: all that fit are answered in time, the others are refused at once."""
    fit = math.floor(deadline_s / alone_s(BULK))
    simulation = warm()
    since = simulation.now
    for _ in range(64):
        simulation.at(since, lambda: simulation.arrive(Arrival(BULK, deadline_s)))
    simulation.run()
    assert len(simulation.answered) >= 0.9 * fit >= 0.9
    assert all(end - came <= deadline_s * 1e3 for came, end, _ in simulation.answered)
    assert all(when == since for when, _ in simulation.refused)
    assert len(simulation.answered) + len(simulation.refused) == 64


def test_a_few_images_overtake_many() -> None:
    bulk = Arrival(BULK, caller="bulk")
    small = Arrival(SMALL, 2.0, "small")
    simulation = Simulation(replica())
    closed_loop(simulation, itertools.repeat(bulk, 4), 60.0)
    for k in range(100):
        simulation.at(250.0 + 500 * k, lambda: simulation.arrive(small))
    simulation.run()
    assert not simulation.refused
    waits = [(end - came) / 1e3 for came, end, asked in simulation.answered if asked is small]
    assert len(waits) == 100
    assert np.percentile(waits, 95) <= 2 * alone_s(SMALL) + STEP_S
    # What the small ones do not use is the others'.
    left = 60.0 - sum(waits)
    assert images_of(simulation, 60.0)["bulk"] >= 0.9 * left / alone_s(BULK) * BULK


def test_many_images_are_not_starved() -> None:
    simulation = Simulation(replica())
    small, bulk = Arrival(SMALL, caller="small"), Arrival(BULK, caller="bulk")
    closed_loop(simulation, iter([*[small] * 32, bulk]), 60.0)
    simulation.run()
    assert not simulation.refused
    share = images_of(simulation, 60.0)["bulk"] / BULK * alone_s(BULK) / 60.0
    assert share >= 0.8 * MANY_IMAGES_SHARE


@pytest.mark.parametrize("images", [SMALL, BULK])
def test_callers_have_their_shares(images: int) -> None:
    simulation = Simulation(replica(), weights={"much": 3.0})
    clients = [Arrival(images, caller=name) for name in ("much", "little") for _ in range(64)]
    closed_loop(simulation, iter(clients), 60.0)
    simulation.run()
    made = images_of(simulation, 60.0)
    assert 2.4 <= made["much"] / made["little"] <= 3.6


def test_a_greedy_caller_leaves_room_for_another() -> None:
    """One caller asks for more than the server can do. Another gets in, and so gets its share."""
    simulation = Simulation(replica())
    greedy, other = Arrival(BULK, 20.0, "greedy"), Arrival(8, 4.0, "other")
    for k in range(600):
        simulation.at(100.0 * k, lambda: simulation.arrive(greedy))
    for k in range(300):
        simulation.at(50.0 + 200.0 * k, lambda: simulation.arrive(other))
    simulation.run()
    late = [each for each in simulation.answered if each[1] - each[0] > each[2].timeout_s * 1e3]
    assert not late
    used = {name: made / BULK * alone_s(BULK) for name, made in images_of(simulation, 60).items()}
    assert used["other"] >= 0.3 * 60
    assert used["other"] + used["greedy"] >= 0.85 * 60


def test_the_hint_is_right() -> None:
    """Whoever comes back after the time that it was told is taken."""
    scheduler = Scheduler(Times({"model": {2: 0.02, 64: 0.32}}))
    for _ in range(5):
        scheduler.times.ran("model", 64, 0.32)
    needs, hints = [Need("model", 64, 64, 10)], []
    for _ in range(8):
        try:
            scheduler.take(needs, 32, 10.5, 0.0)
        except BusyError as error:
            hints.append(float(str(error).rpartition("retry after ")[2].removesuffix(" s")))
    assert len(hints) == 5 and len(set(hints)) == 1
    work, calls = scheduler._taken[0], math.floor(hints[0] / 0.32)
    for call in range(1, calls + 2):
        scheduler.progressed(work, "model", 64)
        now = call * 0.32
        if call == calls - 1:  # too early
            with pytest.raises(BusyError):
                scheduler.take(needs, 32, 10.5 + now, now)
    scheduler.take(needs, 32, 10.5 + now, now)


def test_what_cannot_be_done_is_refused_as_such() -> None:
    scheduler = Scheduler(Times({"model": {2: 0.02, 64: 0.32}}))
    needs = [Need("model", 64, 64, 10)]
    taken = scheduler.take(needs, 32, 1.0, 0.0)  # nobody knows yet whether 3.2 s is true
    scheduler.leave(taken)
    for _ in range(5):
        scheduler.times.ran("model", 64, 0.32)
    with pytest.raises(DeadlineError, match=r"needs 3.2 s here, its deadline of 1 s cannot be met"):
        scheduler.take(needs, 32, 2.0, 1.0)
    # From time to time an idle server tries all the same: its estimate may be old.
    scheduler.leave(scheduler.take(needs, 32, 101.0, 100.0))
    with pytest.raises(DeadlineError):
        scheduler.take(needs, 32, 101.0, 100.0)


def test_random_loads_are_never_late() -> None:
    """Whatever is taken is answered in time; and with one kind of request the server is full."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        simulation = warm()
        since = simulation.now
        for when in since + np.cumsum(rng.exponential(60.0, 300)):
            images = int(rng.choice([1, 2, 4, 8, 16, 64]))
            asked = Arrival(images, float(rng.uniform(1.5, 8) * alone_s(images)), str(images % 3))
            simulation.at(float(when), partial(simulation.arrive, asked))
        simulation.run()
        late = [of for of in simulation.answered if of[1] - of[0] > of[2].timeout_s * 1e3]
        assert len(late) <= 3  # batches are shared a little worse than planned
        assert len(simulation.answered) + len(simulation.refused) == 300


def test_callers_that_have_gone_are_forgotten() -> None:
    scheduler = Scheduler(Times({}))
    stays = scheduler.take([Need("model", 2, 64)], 1, 1e6, 0.0, "stays")
    for k in range(5000):
        scheduler.leave(scheduler.take([Need("model", 2, 64)], 1, 1e6, 0.0, f"caller {k}"))
    assert len(scheduler._used) <= 1000 and "stays" in scheduler._used
    scheduler.leave(stays)
    scheduler.leave(stays)  # a deadline and an answer may both tell it
    assert scheduler.left_s == 0


def test_times_learn_what_calls_take() -> None:
    times = Times({"model": {2: 0.010, 16: 0.050}})
    assert times.seconds("model", 9) == pytest.approx(0.030)
    assert times.seconds("model", 30) == pytest.approx(0.090)
    for _ in range(50):
        times.ran("model", 16, 0.100)
    assert times.seconds("model", 16) == pytest.approx(0.100, rel=0.02)
    assert times.seconds("model", 2) == pytest.approx(0.020, rel=0.02)  # the nearest that is known
    before = times.seconds("model", 16)
    times.ran("model", 16, 60.0)  # a machine that slept for a minute
    assert times.seconds("model", 16) < 1.2 * before
    assert times.seconds("unknown", 4) == 0
    times.ran("unknown", 4, 0.5)
    assert times.seconds("unknown", 4) == 0.5


def test_best_rows() -> None:
    """The fewest rows with nearly the most rows per second; all of them if nobody measured."""
    flat = {2: 0.008, 4: 0.008, 8: 0.010, 16: 0.016, 32: 0.032, 64: 0.064}
    times = Times({"flat": flat, "growing": {2: 0.002, 64: 0.032}})
    assert times.best_rows("flat", 64) == MIN_ROWS
    assert times.best_rows("flat", 8) == 8
    assert times.best_rows("growing", 64) == 64
    assert times.best_rows("unknown", 48) == 48
