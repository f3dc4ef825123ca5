"""Which requests are taken, and whose rows run next. The service and the simulator share this code.

All times are in seconds. Nothing here waits, locks or reads a clock.

- **Admission by work.** A request is taken if it and all that were taken before can be answered in
  time, each by its deadline (the processor demand test for earliest deadline first). Otherwise it
  is refused at once, with the time after which it would have fitted.
- **Few rows at a time.** Only as many rows run together as still raise the images per second.
  The other requests wait, so that the first are done before the last begin.
- **Order.** Requests with few images first, callers by their weighted shares, then by deadline. As
  soon as there is no time to spare, by deadline alone. Requests with many images get a fifth of
  the time whatever happens.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from flowturbo.errors import BusyError, DeadlineError

NEAR_BEST = 0.98  # of the most rows per second: more rows at a time only make others wait
FEW_IMAGES = 4  # of an interactive request
MANY_IMAGES_SHARE = 0.2  # of the time, for requests with more images
MAX_SKIPPED = 8  # turns in a row; about as many as a request makes of the predictor
_JOINS_AT = 1.25  # times as long a batch of few images may take for the rows of others
_LEARNING = 0.1  # the weight of a new measurement
_SURE = 5  # measurements until a time is trusted
_SPARE, _SPARE_UNSURE, _SPARE_S = 1.02, 1.1, 0.01  # what is planned beyond the estimate
_OWED_S = 0.5  # requests with many images wait so long for their share
_CONTENDING_S = 1.0  # a refused caller counts as waiting, beyond the time it was told to wait
_PROBE_S = 5.0  # between two requests that an idle server takes against its own estimate
_HOPELESS = 0.8  # of the estimate: if less time than that is left, a request is given up


class Times:
    """How long a call of a model takes, by rows: measured at export, corrected by what it takes.

    `stated` has seconds by model and rows. Models without any are learned from their first calls on
    and take 0 until then.
    """

    def __init__(self, stated: Mapping[str, Mapping[int, float]]) -> None:
        self._stated = {model: sorted(times.items()) for model, times in stated.items() if times}
        self._factors: dict[tuple[str, int], float] = {}
        self._counts: dict[tuple[str, int], int] = defaultdict(int)

    def seconds(self, model: str, rows: int, scale: float = 1.0) -> float:
        """Of one call; `scale` is the size of its latents beside that of the default size."""
        return self._expected(model, rows) * self._factor(model, rows) * scale

    def ran(self, model: str, rows: int, seconds: float, scale: float = 1.0) -> None:
        """Corrects the estimate: a call of `rows` took `seconds`."""
        if model not in self._stated:
            self._stated[model] = [(rows, seconds / scale)]
        key = model, _bucket(rows)
        ratio = seconds / scale / self._expected(model, rows)
        had = self._factor(model, rows)
        # One call in a hundred is held up by something else. A real change comes again.
        ratio = min(max(ratio, had / 2), had * 2)
        self._counts[key] += 1
        weight = max(_LEARNING, 1 / self._counts[key])
        self._factors[key] = had + weight * (ratio - had)

    def is_sure(self, model: str, rows: int) -> bool:
        """Whether enough calls of about so many rows were seen here."""
        return self._counts[model, _bucket(rows)] >= _SURE

    def measured(self) -> dict[tuple[str, int], float]:
        """Seconds by model and rows, of the numbers of rows that were seen here."""
        keys = [(model, 1 << bucket) for model, bucket in self._factors]
        return {(model, rows): self.seconds(model, rows) for model, rows in keys}

    def best_rows(self, model: str, most: int) -> int:
        """The fewest rows at a time, at most `most`, with nearly the most rows per second.

        As stated at export: it does not change while the service runs.
        """
        stated = [(rows, s) for rows, s in self._stated.get(model, ()) if rows <= most]
        if len(stated) < 2:
            return most
        best = max(rows / s for rows, s in stated)
        return next(rows for rows, s in stated if rows / s >= NEAR_BEST * best)

    def _expected(self, model: str, rows: int) -> float:
        """As stated: linear between the stated rows, and through the last two beyond."""
        stated = self._stated.get(model)
        if not stated:
            return 0.0
        k = min(max(bisect_left(stated, (rows, 0.0)), 1), len(stated) - 1)
        if len(stated) == 1 or rows <= stated[0][0]:
            return stated[0][1] * max(1.0, rows / stated[0][0])
        (low, fast), (high, slow) = stated[k - 1], stated[k]
        return fast + (slow - fast) * (rows - low) / (high - low)

    def _factor(self, model: str, rows: int) -> float:
        """The correction for so many rows, else that for the nearest number of rows."""
        bucket = _bucket(rows)
        known = [each for of, each in self._factors if of == model]
        if not known:
            return 1.0
        return self._factors[model, min(known, key=lambda each: abs(each - bucket))]


def _bucket(rows: int) -> int:
    return max(rows - 1, 0).bit_length()


@dataclass(frozen=True)
class Need:
    """One kind of call that a request makes: `count` calls of `model` with `rows` each.

    A batch of such calls has at most `most` rows. `scale` is the size of the latents beside that of
    the default size.
    """

    model: str
    rows: int
    most: int
    count: int = 1
    scale: float = 1.0


@dataclass(eq=False)
class Work:
    """The work of a taken request. `number` is its place in the order of arrival.

    `left_s` is the device time that is left if batches are shared, `alone_s` if it runs alone.
    `is_sure` says whether enough calls like its own were seen to rely on that.
    """

    caller: str
    images: int
    deadline: float
    number: int
    left_s: float
    alone_s: float
    is_sure: bool

    @property
    def has_few(self) -> bool:
        """Whether somebody probably waits for it: it has few images."""
        return self.images <= FEW_IMAGES

    @property
    def place(self) -> tuple[float, int]:
        """Its place by deadline."""
        return self.deadline, self.number


class Waiting(Hashable, Protocol):
    """A call that waits for a device; equal to itself alone."""

    @property
    def work(self) -> Work | None:
        """The work of its request; None for calls that nobody planned."""
        ...

    @property
    def model(self) -> str: ...

    @property
    def key(self) -> Hashable:
        """Calls of one key can be joined to one batch."""
        ...

    @property
    def rows(self) -> int: ...

    @property
    def most(self) -> int:
        """Rows of a batch of such calls."""
        ...


Call = TypeVar("Call", bound=Waiting)


@dataclass
class Turns:
    """How often in a row calls of a key that could have run on a device were left out."""

    skipped: dict[Hashable, int] = field(default_factory=dict)


@dataclass
class Scheduler:
    """Takes or refuses requests, and chooses batches. `devices` run at a time.

    `weights` are callers' shares of the time; a caller without one has 1.
    """

    times: Times
    devices: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._taken: dict[Work, None] = {}
        self._count = 0
        self._used: dict[str, float] = {}  # weighted seconds by caller
        self._owed_s = 0.0  # to requests with many images
        self._next_probe_at = -math.inf
        self._contending: dict[str, float] = {}  # refused callers, and until when they count

    def take(
        self, needs: Iterable[Need], images: int, deadline: float, now: float, caller: str = ""
    ) -> Work:
        """Takes a request. Raises BusyError or DeadlineError if it cannot be done in time."""
        needs = list(needs)
        shared_s = sum(self.shared_s(need) * need.count for need in needs)
        alone_s = sum(self._alone_s(need) * need.count for need in needs)
        sure = all(self.times.is_sure(need.model, self.chunk(need)) for need in needs)
        self._count += 1
        work = Work(caller, images, deadline, self._count, shared_s, alone_s, sure)
        if not self._is_probe(now):
            self._refuse_late(work, now)
        self._contending.pop(caller, None)
        if caller not in self._used or not any(each.caller == caller for each in self._taken):
            # Nobody saves up time by not asking.
            present = [self._used[each.caller] for each in self._taken]
            self._used[caller] = max([self._used.get(caller, 0.0), min(present, default=0.0)])
        self._taken[work] = None
        return work

    def _is_probe(self, now: float) -> bool:
        """Whether an idle server takes a request whatever it expects: it may have been wrong."""
        if self._taken or now < self._next_probe_at:
            return False
        self._next_probe_at = now + _PROBE_S
        return True

    def _refuse_late(self, work: Work, now: float) -> None:
        given_s = work.deadline - now
        if work.is_sure and work.alone_s > given_s:
            raise DeadlineError(
                f"the request needs {_shown(work.alone_s)} here, its deadline of "
                f"{_shown(given_s)} cannot be met: ask for fewer images, a shorter schedule or "
                "more time"
            )
        if not self._taken:
            return
        spare = _SPARE if work.is_sure else _SPARE_UNSURE
        late_s = max(self._late_s(work, now, spare), self._beyond_share_s(work, now))
        if late_s > 0:
            self._contending[work.caller] = now + late_s + _CONTENDING_S
            raise BusyError(
                "the server is busy and would miss this or another request's deadline; retry "
                f"after {max(late_s, 0.1):.1f} s"
            )

    def leave(self, work: Work) -> None:
        """The request is answered."""
        self._taken.pop(work, None)
        if not self._taken:
            self._owed_s = 0.0

    @property
    def left_s(self) -> float:
        """The device time that all taken requests still need."""
        return sum(work.left_s for work in self._taken) / self.devices

    def progressed(self, work: Work, need: Need) -> None:
        """A call of `work` is done."""
        work.left_s = max(0.0, work.left_s - self.shared_s(need))
        work.alone_s = max(0.0, work.alone_s - self._alone_s(need))

    def is_hopeless(self, work: Work, now: float) -> bool:
        """Whether the deadline cannot be met any more, even alone."""
        return work.is_sure and work.alone_s * _HOPELESS > work.deadline - now

    def shared_s(self, need: Need) -> float:
        """Device time of one call whose batch is shared with others."""
        best = self.chunk(need)
        return self.times.seconds(need.model, best, need.scale) * need.rows / best

    def chunk(self, need: Need) -> int:
        """The rows of the parts in which larger calls run, so that others can run in between."""
        return self.times.best_rows(need.model, need.most)

    def next_batch(
        self,
        waiting: Sequence[Call],
        models: Sequence[str],
        turns: Turns,
        now: float,
        free: int = 1,
    ) -> list[Call]:
        """The calls of one batch, of those that wait for a device, in the order of their rows.

        `models` are those of the device, in the order in which programs call them. `free` devices
        share what waits.
        """
        ordered = sorted(waiting, key=self._order(waiting, now))
        first = ordered[0]
        together = self._together(ordered, first)
        by_key: dict[Hashable, list[Call]] = defaultdict(list)
        for call in together:
            by_key[call.key].append(call)
        key = self._key_of(by_key, models, turns)
        batch = by_key[key]
        turns.skipped = {each: turns.skipped.get(each, 0) + 1 for each in by_key if each != key}
        same = [call for call in ordered if call.key == batch[0].key]
        limit = min(self._limit(batch[0]), math.ceil(sum(call.rows for call in same) / free))
        return self._filled(batch, same, limit)

    def ran(self, batch: Sequence[Waiting], seconds: float, scale: float = 1.0) -> None:
        """A batch took `seconds`: corrects the estimate, and charges its callers."""
        rows = sum(call.rows for call in batch)
        self.times.ran(batch[0].model, rows, seconds, scale)
        for call in batch:
            if call.work:
                cost, caller = seconds * call.rows / rows, call.work.caller
                self._used[caller] = self._used.get(caller, 0.0) + cost / self._weight(caller)
        works = [call.work for call in batch if call.work]
        if any(not work.has_few for work in works):
            self._owed_s = max(0.0, self._owed_s - seconds)
        elif works and any(not work.has_few for work in self._taken):
            self._owed_s += seconds * MANY_IMAGES_SHARE / (1 - MANY_IMAGES_SHARE)

    def _order(self, waiting: Sequence[Waiting], now: float) -> "_Key":
        tight = self._least_spare_s(now) <= 0
        many_first = self._owed_s > _OWED_S and any(
            call.work and not call.work.has_few for call in waiting
        )
        return _Key(self._used, tight=tight, many_first=many_first)

    def _key_of(
        self, by_key: Mapping[Hashable, Sequence[Waiting]], models: Sequence[str], turns: Turns
    ) -> Hashable:
        """The key with the most calls; of several, that of the later model.

        A few early requests wait for the many behind them, and cohorts merge. But no key is left
        out too often.
        """
        late = max(by_key, key=lambda key: turns.skipped.get(key, 0))
        if turns.skipped.get(late, 0) >= MAX_SKIPPED:
            return late
        return max(by_key, key=lambda key: (len(by_key[key]), models.index(by_key[key][0].model)))

    def _together(self, ordered: Sequence[Call], first: Call) -> list[Call]:
        """The calls that may run now: as many rows as still raise the images per second."""
        chosen: list[Call] = []
        share = 0.0
        for call in ordered:
            more = call.rows / self._limit(call)
            if (not chosen or share + more <= 1) and self._joins(call, first, chosen):
                chosen.append(call)
                share += more
        return chosen

    def _filled(self, batch: list[Call], same: Sequence[Call], limit: int) -> list[Call]:
        """`batch` with more of the `same` calls, up to `limit` rows; at least its first call."""
        chosen, known = [batch[0]], set(batch)
        rows = batch[0].rows
        for call in [*batch[1:], *(call for call in same if call not in known)]:
            if rows + call.rows <= limit and self._joins(call, batch[0], chosen):
                chosen.append(call)
                rows += call.rows
        return chosen

    def _joins(self, call: Call, first: Call, chosen: Sequence[Call]) -> bool:
        """Whether `call` may run beside `chosen`: many images do not hold up few."""
        if not (first.work and first.work.has_few and call.work and not call.work.has_few):
            return True
        if call.key != first.key:
            return False
        rows = sum(each.rows for each in chosen if each.key == first.key)
        model, times = call.model, self.times
        return times.seconds(model, rows + call.rows) <= _JOINS_AT * times.seconds(model, rows)

    def _limit(self, call: Waiting) -> int:
        return self.times.best_rows(call.model, call.most)

    def _alone_s(self, need: Need) -> float:
        best = self.chunk(need)
        whole, rest = divmod(need.rows, best)
        times = self.times
        full = whole * times.seconds(need.model, best, need.scale)
        return full + (times.seconds(need.model, rest, need.scale) if rest else 0.0)

    def _late_s(self, new: Work, now: float, spare: float) -> float:
        """How much too late the first deadline that fails would be missed; 0 if none is."""
        return self._worst_s([*self._taken, new], now, spare, since=new.place)

    def _least_spare_s(self, now: float) -> float:
        return (
            -self._worst_s(self._taken, now, _SPARE, since=(-math.inf, 0)) if self._taken else 1.0
        )

    def _worst_s(
        self, works: Iterable[Work], now: float, spare: float, since: tuple[float, int]
    ) -> float:
        """The largest lateness by deadline order, of works from the place `since` on."""
        total, worst = 0.0, -math.inf
        for work in sorted(works, key=lambda each: each.place):
            total += work.left_s / self.devices
            if work.place >= since:
                needed = max(total, work.alone_s) * spare + _SPARE_S
                worst = max(worst, needed - (work.deadline - now))
        return worst

    def _beyond_share_s(self, new: Work, now: float) -> float:
        """How long to wait until the caller is within its share; 0 if nobody else was refused."""
        self._contending = {who: until for who, until in self._contending.items() if until > now}
        others = self._contending.keys() - {new.caller}
        if not others:
            return 0.0
        present = others | {work.caller for work in self._taken} | {new.caller}
        share = self._weight(new.caller) / sum(map(self._weight, present))
        own = [work for work in self._taken if work.caller == new.caller]
        if not own:
            return 0.0
        needed = (sum(work.left_s for work in own) + new.left_s) / self.devices
        return max(0.0, needed - share * (new.deadline - now))

    def _weight(self, caller: str) -> float:
        return self.weights.get(caller, 1.0)


class _Key:
    """The order of waiting calls."""

    def __init__(self, used: Mapping[str, float], *, tight: bool, many_first: bool) -> None:
        self._used = used
        self._tight = tight
        self._many_first = many_first

    def __call__(self, call: Waiting) -> tuple[bool, float, float, int]:
        work = call.work
        if work is None:
            return (False, -math.inf, 0.0, 0)
        if self._tight:
            return (False, 0.0, *work.place)
        return (work.has_few == self._many_first, self._used.get(work.caller, 0.0), *work.place)


def _shown(seconds: float) -> str:
    return f"{seconds:.3g} s"
