"""A job is handed back exactly once: as done, or as expired."""

import queue

import pytest

from flowturbo.serving.deadlines import Deadlines

pytestmark = pytest.mark.unit


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_is_done_in_time_never_expires(clock: Clock) -> None:
    expired: queue.Queue[str] = queue.Queue()
    deadlines: Deadlines[str] = Deadlines(expired.put, clock)
    ticket = deadlines.add("done", clock.now + 0.1)
    assert deadlines.done(ticket)
    assert not deadlines.done(ticket)
    clock.now += 1
    deadlines.add("later", clock.now)
    assert expired.get(timeout=60) == "later"
    deadlines.close()
    assert expired.empty()


def test_the_rest_expires_in_order_of_deadline(clock: Clock) -> None:
    expired: queue.Queue[str] = queue.Queue()
    deadlines: Deadlines[str] = Deadlines(expired.put, clock)
    tickets = {
        job: deadlines.add(job, clock.now + after_s)
        for job, after_s in (("third", 0.3), ("first", 0.1), ("second", 0.2))
    }
    for job in ("first", "second"):
        assert expired.empty()  # until its time has come
        clock.now += 0.1
        assert expired.get(timeout=60) == job
        assert not deadlines.done(tickets[job])
    deadlines.add("past", clock.now - 1)
    assert expired.get(timeout=60) == "past"
    assert deadlines.done(tickets["third"])
    deadlines.close()


def test_a_deadline_in_the_far_future_holds_up_no_other(clock: Clock) -> None:
    """Longer than a lock can wait."""
    expired: queue.Queue[str] = queue.Queue()
    deadlines: Deadlines[str] = Deadlines(expired.put, clock)
    deadlines.add("never", clock.now + 2.0**62)
    deadlines.add("soon", clock.now)
    assert expired.get(timeout=60) == "soon"
    deadlines.close()
