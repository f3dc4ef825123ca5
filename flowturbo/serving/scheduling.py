"""Which requests are taken, and whose rows run next. The service and the simulator share this code.

All times are in seconds. Nothing here waits, locks or reads a clock.

- **Admission by work.** A request is taken if it and all that were taken before can be answered in
  time. This is the processor demand test for earliest deadline first. Otherwise the request is
  refused at once, with the time after which it would have fitted.
- **Few rows at a time.** Only as many rows run together as still raise the images per second.
  The other requests wait, so that the first are done before the last begin.
- **Order.** Requests with few images first, callers by their weighted shares, then by deadline. As
  soon as there is no time to spare, by deadline alone. Requests with many images get a fifth of
  the time whatever happens.
"""

import itertools
import math
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from flowturbo.errors import BusyError, DeadlineError

NEAR_BEST = 0.98  # of the most rows per second: more rows at a time only make others wait
MIN_ROWS = 32  # fewer at a time gain little, and a time that was measured badly could cost much
FEW_IMAGES = 4  # of an interactive request
MANY_IMAGES_SHARE = 0.2  # of the time, for requests with more images
MAX_SKIPPED = 8  # turns in a row; about as many as a request makes of the predictor
_JOINS_AT = 1.25  # times as long a batch of few images may take for the rows of others
_LEARNING = 0.1  # the weight of a new measurement
_SURE = 5  # measurements until a time is trusted
_SPARE, _SPARE_UNSURE = 1.03, 1.1  # times the estimate is planned
_OWED_S = 0.5  # requests with many images wait so long for their share
_CONTENDING_S = 10.0  # so long after its time to come back a refused caller counts as waiting
_CALLERS = 1000  # whose use of the time is remembered after they have gone
_PROBE_S = 5.0  # between two requests that an idle server takes against its own estimate
_FIRST = -math.inf, 0  # the place of calls that nobody planned
_HOPELESS = 0.8  # of the estimate: if less time than that is left, a request is given up


def stated_rows(most: int) -> list[int]:
    """The numbers of rows, up to `most`, for which an export states times."""
    return [2**k for k in range(1, most.bit_length()) if 2**k < most] + [most]


class Times:
    """How long a call of a model takes, by rows: measured at export, corrected by what it takes.

    `stated` has seconds by model and rows. Models without any are learned from their first calls on
    and take 0 until then.
    """

    def __init__(self, stated: Mapping[str, Mapping[int, float]]) -> None:
        self._stated = {model: sorted(times.items()) for model, times in stated.items() if times}
        self._factors: dict[str, dict[int, float]] = defaultdict(dict)  # by model and bucket
        self._counts: Counter[tuple[str, int]] = Counter()
        self._best: dict[tuple[str, int], int] = {}
        self._seconds: dict[tuple[str, int], float] = {}  # until the next correction

    def seconds(self, model: str, rows: int, scale: float = 1.0) -> float:
        """Of one call; `scale` is the size of its latents beside that of the default size."""
        key = model, rows
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = self._expected(model, rows) * self._factor(model, rows)
        return found * scale

    def ran(self, model: str, rows: int, seconds: float, scale: float = 1.0) -> None:
        """Corrects the estimate: a call of `rows` took `seconds`."""
        if model not in self._stated:
            self._stated[model] = [(rows, seconds / scale)]
        bucket = _bucket(rows)
        ratio = seconds / scale / self._expected(model, rows)
        had = self._factor(model, rows)
        # One call in a hundred is held up by something else. A real change comes again.
        ratio = min(max(ratio, had / 2), had * 2)
        self._counts[model, bucket] += 1
        weight = max(_LEARNING, 1 / self._counts[model, bucket])
        self._factors[model][bucket] = had + weight * (ratio - had)
        self._seconds.clear()

    def is_sure(self, model: str, rows: int) -> bool:
        """Whether enough calls of about so many rows were seen here."""
        return self._counts[model, _bucket(rows)] >= _SURE

    def measured(self) -> dict[tuple[str, int], float]:
        """Seconds by model and rows, of the numbers of rows that were seen here."""
        keys = [(model, 1 << bucket) for model, of in self._factors.items() for bucket in of]
        return {(model, rows): self.seconds(model, rows) for model, rows in keys}

    def best_rows(self, model: str, most: int) -> int:
        """The fewest rows at a time, at most `most`, with nearly the most rows per second.

        As stated at export: it does not change while the service runs.
        """
        found = self._best.get((model, most))
        if found is None:
            found = self._best[model, most] = self._find_best(model, most)
        return found

    def _find_best(self, model: str, most: int) -> int:
        speeds = [(rows, rows / s) for rows, s in self._stated.get(model, ()) if rows <= most]
        if len(speeds) < 2:
            return most
        best = max(speed for _, speed in speeds)
        found = next(rows for rows, speed in speeds if speed >= NEAR_BEST * best)
        return max(found, min(MIN_ROWS, most))

    def _expected(self, model: str, rows: int) -> float:
        """As stated: linear between the stated rows, and through the last two beyond."""
        stated = self._stated.get(model)
        if not stated:
            return 0.0
        if len(stated) == 1 or rows <= stated[0][0]:
            return stated[0][1] * max(1.0, rows / stated[0][0])
        k = min(max(bisect_left(stated, (rows, 0.0)), 1), len(stated) - 1)
        (low, fast), (high, slow) = stated[k - 1], stated[k]
        return fast + (slow - fast) * (rows - low) / (high - low)

    def _factor(self, model: str, rows: int) -> float:
        """The correction for so many rows, else that for the nearest number of rows."""
        known, bucket = self._factors.get(model), _bucket(rows)
        if not known:
            return 1.0
        if bucket in known:
            return known[bucket]
        return known[min(known, key=lambda each: abs(each - bucket))]


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

    `left` are the rows that each model still has to run for it, scaled to the default size. `rows`
    are those of its largest call, as a share of a full batch. Alone they take `alone` times as long
    as in full batches. `is_sure` says whether enough such calls were seen to rely on that.
    """

    caller: str
    images: int
    deadline: float
    number: int
    left: dict[str, float]
    rows: float
    alone: float
    is_sure: bool
    needed_s: float = 0.0  # at the beginning, at least

    def __post_init__(self) -> None:
        # Plain attributes: they are read for each waiting call before each batch.
        self.has_few = self.images <= FEW_IMAGES  # somebody probably waits for it
        self.kind = self.caller, self.has_few
        self.place = self.deadline, self.number  # by deadline


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
        self._taken: list[Work] = []  # by deadline
        self._kinds: Counter[tuple[str, bool]] = Counter()  # of taken work: caller, few images
        self._most: dict[str, int] = {}  # rows of a batch, by model
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
        left: dict[str, float] = defaultdict(float)
        for need in needs:
            self._most[need.model] = max(need.most, self._most.get(need.model, 0))
            left[need.model] += need.rows * need.count * need.scale
        sure = all(self.times.is_sure(need.model, self.chunk(need)) for need in needs)
        self._count += 1
        rows = max((need.rows / self.chunk(need) for need in needs), default=0.0)
        work = Work(caller, images, deadline, self._count, left, rows, 1.0, sure)
        if shared_s := self._left_s(work):
            alone_s = sum(self._alone_s(need) * need.count for need in needs)
            work.alone = max(1.0, alone_s / shared_s)
            work.needed_s = self._needed_s(work)
        if not self._is_probe(now):
            self._refuse_late(work, now)
        present = {who for who, _ in self._kinds}
        if caller not in present:  # nobody saves up time by not asking
            least = min((self._used[who] for who in present), default=0.0)
            if len(self._used) >= _CALLERS:
                self._used = {who: self._used[who] for who in present}
            self._used[caller] = max(self._used.get(caller, 0.0), least)
        insort(self._taken, work, key=_place)
        self._kinds[work.kind] += 1
        return work

    def _is_probe(self, now: float) -> bool:
        """Whether an idle server takes a request whatever it expects: it may have been wrong."""
        if self._taken or now < self._next_probe_at:
            return False
        self._next_probe_at = now + _PROBE_S
        return True

    def _refuse_late(self, work: Work, now: float) -> None:
        given_s = work.deadline - now
        if work.is_sure and self._needed_s(work) > given_s:
            raise DeadlineError(
                f"the request needs {_shown(self._needed_s(work))} here, its deadline of "
                f"{_shown(given_s)} cannot be met: ask for fewer images, a shorter schedule or "
                "more time"
            )
        if not self._taken:
            return  # nothing could make it earlier
        late_s = max(self._worst_s(now, work), self._beyond_share_s(work, now))
        if late_s > 0:
            self._contending[work.caller] = now + late_s + _CONTENDING_S
            raise BusyError(
                "the server is busy and would miss this or another request's deadline; retry "
                f"after {max(late_s, 0.1):.1f} s"
            )

    def leave(self, work: Work) -> None:
        """The request is answered; may be told twice."""
        if work not in self._taken:
            return
        self._taken.remove(work)
        self._kinds[work.kind] -= 1
        self._kinds = +self._kinds
        if not self._taken:
            self._owed_s = 0.0

    @property
    def left_s(self) -> float:
        """The device time that all taken requests still need."""
        return sum(map(self._left_s, self._taken)) / self.devices

    def progressed(self, work: Work, model: str, rows: int, scale: float = 1.0) -> None:
        """A call of `work` is done."""
        if model in work.left:
            work.left[model] = max(0.0, work.left[model] - rows * scale)

    def is_hopeless(self, work: Work, now: float) -> bool:
        """Whether the deadline cannot be met any more, even alone."""
        return work.is_sure and self._needed_s(work) * _HOPELESS > work.deadline - now

    def chunk(self, call: Need | Waiting) -> int:
        """The rows of a full batch of such calls.

        Larger calls run in parts of so many rows, so that others can run in between.
        """
        return self.times.best_rows(call.model, call.most)

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
        # Requests of one kind are in order of their deadlines anyway.
        tight = len(self._kinds) > 1 and self._worst_s(now) >= 0
        ordered = self._ordered(waiting, tight=tight)
        key = ordered[0].key if tight else self._key_of(self._together(ordered), models, turns)
        if tight:
            same = list(itertools.takewhile(lambda call: call.key == key, ordered))
        else:
            same = [call for call in ordered if call.key == key]
        limit = min(self.chunk(same[0]), math.ceil(sum(call.rows for call in same) / free))
        return self._filled(same, limit, now, tight=tight)

    def ran(
        self, batch: Sequence[Waiting], seconds: float, scale: float = 1.0, *, learn: bool = True
    ) -> None:
        """A batch took `seconds`: charges its callers and, with `learn`, corrects the estimate."""
        rows = sum(call.rows for call in batch)
        if learn:
            self.times.ran(batch[0].model, rows, seconds, scale)
        for call in batch:
            if call.work:
                cost, caller = seconds * call.rows / rows, call.work.caller
                self._used[caller] = self._used.get(caller, 0.0) + cost / self._weight(caller)
        works = [call.work for call in batch if call.work]
        if any(not work.has_few for work in works):
            self._owed_s = max(0.0, self._owed_s - seconds)
        elif works and any(not few for _, few in self._kinds):
            self._owed_s += seconds * MANY_IMAGES_SHARE / (1 - MANY_IMAGES_SHARE)

    def _ordered(self, waiting: Sequence[Call], *, tight: bool) -> list[Call]:
        if tight or len(self._kinds) <= 1:
            return sorted(waiting, key=_place_of)
        many_first = self._owed_s > _OWED_S and not all(map(_has_few, waiting))

        def key(call: Call) -> tuple[bool, float, tuple[float, int]]:
            work = call.work
            if work is None:
                return False, -math.inf, _FIRST
            return work.has_few is many_first, self._used.get(work.caller, 0.0), work.place

        return sorted(waiting, key=key)

    def _key_of(self, together: Sequence[Waiting], models: Sequence[str], turns: Turns) -> Hashable:
        """The key with the most calls; of several, that of the later model.

        A few early requests wait for the many behind them, and cohorts merge. But no key is left
        out too often.
        """
        counts = Counter([call.key for call in together])
        if len(counts) == 1:
            turns.skipped.clear()
            return together[0].key
        place = {call.key: models.index(call.model) for call in together}
        late = max(counts, key=lambda key: turns.skipped.get(key, 0))
        most = max(counts, key=lambda key: (counts[key], place[key]))
        chosen = late if turns.skipped.get(late, 0) >= MAX_SKIPPED else most
        turns.skipped = {key: turns.skipped.get(key, 0) + 1 for key in counts if key != chosen}
        return chosen

    def _together(self, ordered: Sequence[Call]) -> list[Call]:
        """The calls that may run now: as many rows as still raise the images per second."""
        chosen: list[Call] = []
        share, few = 0.0, _has_few(ordered[0])
        for call in ordered:
            more = call.rows / self.chunk(call)
            if not chosen or (share + more <= 1 and (not few or _has_few(call))):
                chosen.append(call)
                share += more
        return chosen

    def _filled(self, same: Sequence[Call], limit: int, now: float, *, tight: bool) -> list[Call]:
        """The first calls of `same`, up to `limit` rows; at least one.

        A call is left out if it would make a call before it too slow: for its deadline, or because
        that one has few images. If it is `tight`, nothing overtakes a call that is left out.
        """
        model, few = same[0].model, _has_few(same[0])
        full_s = self.times.seconds(model, limit)
        chosen: list[Call] = []
        rows, longest_s = 0, math.inf
        for call in same:
            total = rows + call.rows
            if chosen and total > limit:
                if tight:
                    break
                continue
            bearable_s = min(longest_s, self._bearable_s(call, now, full_s))
            if few and not _has_few(call):
                bearable_s = min(bearable_s, _JOINS_AT * self.times.seconds(model, rows))
            if (
                not chosen
                or bearable_s == math.inf
                or (self.times.seconds(model, total) <= bearable_s)
            ):
                chosen.append(call)
                rows, longest_s = total, bearable_s
            elif tight:
                break
        return chosen

    def _bearable_s(self, call: Waiting, now: float, full_s: float) -> float:
        """How long a batch with `call` may take so that its request still ends in time.

        Infinity if even a full batch, which takes `full_s`, is bearable.
        """
        work = call.work
        if work is None or not work.is_sure:
            return math.inf
        own_s, given_s = self.times.seconds(call.model, call.rows), work.deadline - now
        if own_s * given_s >= full_s * work.needed_s * _SPARE:  # more than it ever needed
            return math.inf
        needed_s = self._needed_s(work) * _SPARE
        return own_s * max(1.0, given_s / needed_s) if needed_s else math.inf

    def _alone_s(self, need: Need) -> float:
        best = self.chunk(need)
        whole, rest = divmod(need.rows, best)
        times = self.times
        full = whole * times.seconds(need.model, best, need.scale)
        return full + (times.seconds(need.model, rest, need.scale) if rest else 0.0)

    def _left_s(self, work: Work) -> float:
        """The device time that is left, in shared batches."""
        return sum(rows * self._row_s(model) for model, rows in work.left.items())

    def _needed_s(self, work: Work) -> float:
        """How long it takes at least."""
        return self._left_s(work) * work.alone / self.devices

    def _row_s(self, model: str) -> float:
        best = self._best_rows(model)
        return self.times.seconds(model, best) / best

    def _best_rows(self, model: str) -> int:
        return self.times.best_rows(model, self._most[model])

    def _worst_s(self, now: float, new: Work | None = None) -> float:
        """The largest lateness if all taken work is done in order of the deadlines.

        With `new`: if it is done too, and only from its place on.
        """
        row_s, step_s = {}, 0.0
        for model in self._most:
            best = self._best_rows(model)
            spare = _SPARE if self.times.is_sure(model, best) else _SPARE_UNSURE
            row_s[model] = self._row_s(model) * spare / self.devices
            step_s = max(step_s, row_s[model] * best)
        works, start = self._taken, 0
        if new:
            start = bisect_left(works, _place(new), key=_place)
            works = [*works[:start], new, *works[start:]]
        # A full batch has no room for others.
        together = {
            few: sum(w.rows for w in works if w.has_few is few and w.rows <= 0.5)
            for few in (True, False)
        }
        total, worst = step_s, -math.inf  # what runs now is not interrupted
        for k, work in enumerate(works):
            own = sum(rows * row_s[model] for model, rows in work.left.items())
            # Batches are full only if there are others of its kind to fill them.
            filled = min(1.0, max(0.0, together[work.has_few] - work.rows))
            total += own * (work.alone + (1 - work.alone) * filled)
            if k >= start:
                needed = max(total, step_s + own * work.alone)
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
        needed = sum(map(self._left_s, [*own, new])) / self.devices
        return max(0.0, needed - share * (new.deadline - now))

    def _weight(self, caller: str) -> float:
        return self.weights.get(caller, 1.0)


def _place_of(call: Waiting) -> tuple[float, int]:
    return call.work.place if call.work else _FIRST


def _has_few(call: Waiting) -> bool:
    return call.work is not None and call.work.has_few


def _place(work: Work) -> tuple[float, int]:
    return work.place


def _shown(seconds: float) -> str:
    return f"{seconds:.3g} s"
