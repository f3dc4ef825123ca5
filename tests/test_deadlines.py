"""A job is handed back exactly once: as done, or as expired."""

import threading
import time

from flowturbo.serving.deadlines import Deadlines


def test_what_is_done_in_time_never_expires() -> None:
    expired: list[str] = []
    deadlines: Deadlines[str] = Deadlines(expired.append)
    ticket = deadlines.add("done", time.monotonic() + 0.1)
    assert deadlines.done(ticket)
    assert not deadlines.done(ticket)
    time.sleep(0.3)
    assert expired == []


def test_the_rest_expires_in_order_of_deadline() -> None:
    expired: list[str] = []
    all_three = threading.Event()

    def expire(job: str) -> None:
        expired.append(job)
        if len(expired) == 3:
            all_three.set()

    deadlines: Deadlines[str] = Deadlines(expire)
    now = time.monotonic()
    late = deadlines.add("late", now + 0.2)
    for job, after_s in (("later", 0.3), ("past", -1.0)):
        deadlines.add(job, now + after_s)
    assert all_three.wait(10)
    assert expired == ["past", "late", "later"]
    assert time.monotonic() >= now + 0.3
    assert not deadlines.done(late)


def test_a_deadline_in_the_far_future_holds_up_no_other() -> None:
    expired = threading.Event()
    deadlines: Deadlines[str] = Deadlines(lambda job: expired.set())
    deadlines.add("never", time.monotonic() + 2.0**62)
    time.sleep(0.05)
    deadlines.add("soon", time.monotonic() + 0.1)
    assert expired.wait(10)
    deadlines.close()
