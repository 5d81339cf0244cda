"""A discrete-event simulation of replicas behind a load balancer, from the measured costs of their steps.

A replica does what the thread of runtime/serving/scheduler.py does: begin the rows that came, run one queue
of rows that wait for the same segment, answer the rows that left, and again. A network without exits is one
segment. Times are seconds. Nothing here measures anything: fleet_costs.py does.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.inputs.text import LENGTH_STEP

BALANCERS = ("shortest queue", "round robin")
ROWS = 256  # rows that are under way at once on a replica, as in the scheduler
_KEY = 1 << 20  # a queue's key is segment * _KEY + tokens, so that the largest key is the deepest queue
BACKLOG = 3000  # requests that are there at once where a capacity is measured

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Network:
    """What a network's steps cost on one replica, in seconds, and how its rows share steps.

    begin [tokens + 1][rows + 1]: the stem. steps [segments][tokens + 1][rows + 1]. join, split [tokens + 1]:
    for each row of a step whose rows come from several earlier steps, and for each row that goes on where
    others left. finish: for each row, from its encoding and its answer. limit: rows of a step at most. rows:
    rows under way at most. mixed: rows of all lengths share a step, padded to the longest. pads_alone: a row
    that begins alone is padded as others are while rows wait on the replica, as the scheduler does.
    """

    begin: list[list[float]]
    steps: list[list[list[float]]]
    join: list[float]
    split: list[float]
    finish: float
    limit: int
    rows: int = ROWS
    mixed: bool = False
    pads_alone: bool = False

    def seconds_alone(self, tokens: Ids, exits: Ids) -> Floats:
        """The time of rows on a replica that does nothing else [rows]; exits: 0-based."""
        one = np.array([[row[1] for row in table] for table in (self.begin, *self.steps)])
        seconds: Floats = one.cumsum(axis=0)[exits + 1, tokens] + self.finish
        return seconds


@dataclass(frozen=True)
class Requests:
    """Requests in the order of arrival: seconds, tokens of the text, exit (0-based), each [requests]."""

    arrivals: Floats
    tokens: Ids
    exits: Ids

    def without_exits(self) -> Requests:
        """The same requests for a network of one segment."""
        return Requests(self.arrivals, self.tokens, np.zeros_like(self.exits))


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave. seconds [requests]: from arrival to answer; answers [requests]: how often each
    was answered; busy: seconds of all replicas together; steps: of segments; stepped: rows of all of them.
    """

    seconds: Floats
    answers: Ids
    busy: float
    steps: int
    stepped: int
    end: float


class _Replica:
    """Rows of one replica: those that came, and those that wait, by queue, in groups (first begin, rows)."""

    __slots__ = ("answered", "arrived", "busy", "is_running", "queues", "stepped", "steps", "under_way")

    def __init__(self) -> None:
        self.arrived: deque[int] = deque()
        self.queues: dict[int, list[tuple[float, list[int]]]] = {}
        self.answered: list[int] = []
        self.under_way = self.steps = self.stepped = 0
        self.busy, self.is_running = 0.0, False


class _Fleet:
    """The replicas of one simulation, and what their steps do to rows."""

    def __init__(self, network: Network, requests: Requests, replicas: int) -> None:
        self.network = network
        self.tokens: list[int] = requests.tokens.tolist()
        self.exits: list[int] = requests.exits.tolist()
        self.begun = [0.0] * len(self.tokens)
        self.replicas = [_Replica() for _ in range(replicas)]

    def run(self, replica: _Replica, now: float) -> float:
        """Let a replica begin rows and run one step from `now` on; gives the time at which it ends."""
        network, at = self.network, now
        if replica.arrived and replica.under_way < network.rows:
            at = self._begin(replica, at)
        queues = replica.queues
        key = next(iter(queues)) if len(queues) == 1 else self._choose(queues)
        queue = queues[key]
        joined = len(queue) > 1
        if joined:
            rows = self._pop(queues, key)
        else:
            rows = queue[0][1]
            del queues[key]
        segment, tokens = divmod(key, _KEY)
        count = len(rows)
        at += network.steps[segment][tokens][count]
        if joined:
            at += count * network.join[tokens]
        exits = self.exits
        answered = [row for row in rows if exits[row] == segment]
        if answered:
            if len(answered) < count:
                rows = [row for row in rows if exits[row] > segment]
                at += len(rows) * network.split[tokens]
                self._wait(queues, key + _KEY, rows)
            at += len(answered) * network.finish
            replica.under_way -= len(answered)
        elif joined:
            self._wait(queues, key + _KEY, rows)
        else:  # the group as it is, without a look at each row
            queues.setdefault(key + _KEY, []).append(queue[0])
        replica.answered = answered
        replica.busy += at - now
        replica.steps += 1
        replica.stepped += count
        return at

    def _begin(self, replica: _Replica, at: float) -> float:
        """Run the stem for rows that came, as far as there is room, those of one length together."""
        arrived, network, tokens = replica.arrived, self.network, self.tokens
        room = network.rows - replica.under_way
        same_length: dict[int, list[int]] = {}
        replica.under_way += min(room, len(arrived))
        for _ in range(min(room, len(arrived))):
            row = arrived.popleft()
            length = 0 if network.mixed else -(-tokens[row] // LENGTH_STEP)
            batch = same_length.setdefault(length, [])
            batch.append(row)
            if len(batch) == network.limit:
                at = self._begin_rows(replica, same_length.pop(length), at)
        for batch in same_length.values():
            at = self._begin_rows(replica, batch, at)
        return at

    def _begin_rows(self, replica: _Replica, rows: list[int], at: float) -> float:
        for row in rows:
            self.begun[row] = at
        longest = max([self.tokens[row] for row in rows])
        # As the scheduler: a row that begins alone is padded only if others wait, which it may join then.
        is_exact = len(rows) == 1 and not (self.network.pads_alone and replica.queues)
        tokens = longest if is_exact else -(-longest // LENGTH_STEP) * LENGTH_STEP
        self._wait(replica.queues, tokens, rows)
        return at + self.network.begin[tokens][len(rows)]

    def _wait(self, queues: dict[int, list[tuple[float, list[int]]]], key: int, rows: list[int]) -> None:
        begun = self.begun
        first = begun[rows[0]] if len(rows) == 1 else min([begun[row] for row in rows])
        queues.setdefault(key, []).append((first, rows))

    def _choose(self, queues: Mapping[int, list[tuple[float, list[int]]]]) -> int:
        """The deepest queue with rows enough for a step, or else that of the row that began first."""
        limit, full, oldest, begun = self.network.limit, -1, -1, math.inf
        for key, queue in queues.items():
            first, rows = queue[0]
            count = len(rows)
            for group in queue[1:]:
                first, count = min(first, group[0]), count + len(group[1])
            if count >= limit and key > full:
                full = key
            if first < begun:
                begun, oldest = first, key
        return oldest if full < 0 else full

    def _pop(self, queues: dict[int, list[tuple[float, list[int]]]], key: int) -> list[int]:
        """Take groups out of a queue, the largest first, up to the limit, as runtime/walker.py does."""
        rows: list[int] = []
        remaining = []
        for group in sorted(queues[key], key=lambda group: -len(group[1])):
            if not rows or len(rows) + len(group[1]) <= self.network.limit:
                rows = rows + group[1]
            else:
                remaining.append(group)
        if remaining:
            queues[key] = remaining
        else:
            del queues[key]
        return rows


class _ShortestQueue:
    """Replicas by the number of requests that they have; one of those with the fewest is drawn at random."""

    def __init__(self, replicas: int, seed: int) -> None:
        self._by_count: list[list[int]] = [list(range(replicas))]
        self._place, self._count, self._least = list(range(replicas)), [0] * replicas, 0
        self._random = np.random.default_rng(seed)
        self._draws: list[float] = []

    def choose(self) -> int:
        """The replica of the next request."""
        while not self._by_count[self._least]:
            self._least += 1
        if not self._draws:
            self._draws = self._random.random(4096).tolist()
        candidates = self._by_count[self._least]
        return candidates[int(self._draws.pop() * len(candidates))]

    def move(self, replica: int, by: int) -> None:
        """Count requests that came to a replica (by > 0) or were answered."""
        count = self._count[replica]
        others, place = self._by_count[count], self._place[replica]
        last = others.pop()
        if last != replica:
            others[place], self._place[last] = last, place
        count += by
        while len(self._by_count) <= count:
            self._by_count.append([])
        self._place[replica], self._count[replica] = len(self._by_count[count]), count
        self._by_count[count].append(replica)
        self._least = min(self._least, count)


def simulate(
    network: Network, requests: Requests, replicas: int, balancer: str = BALANCERS[0], seed: int = 0
) -> Outcome:
    """Answer requests with some replicas, and give the time that each took.

    balancer: a name in BALANCERS; the shortest queue knows the requests of every replica at once. seed: of
    its draws.
    """
    fleet, ends = _Fleet(network, requests, replicas), list[tuple[float, int]]()
    shortest = _ShortestQueue(replicas, seed) if balancer == BALANCERS[0] else None
    arrivals: list[float] = requests.arrivals.tolist()
    answered_at, answers = [math.nan] * len(arrivals), [0] * len(arrivals)

    def end_step() -> None:
        now, number = heapq.heappop(ends)
        replica = fleet.replicas[number]
        for row in replica.answered:
            answered_at[row] = now
            answers[row] += 1
        if shortest is not None and replica.answered:
            shortest.move(number, -len(replica.answered))
        replica.answered = []
        replica.is_running = bool(replica.queues or replica.arrived)
        if replica.is_running:
            heapq.heappush(ends, (fleet.run(replica, now), number))

    for row, now in enumerate(arrivals):
        while ends and ends[0][0] < now:
            end_step()
        if shortest is None:
            number = row % replicas
        else:
            number = shortest.choose()
            shortest.move(number, 1)
        replica = fleet.replicas[number]
        replica.arrived.append(row)
        if not replica.is_running:  # it begins with all requests that come at this moment
            replica.is_running = True
            heapq.heappush(ends, (now, number))
    while ends:
        end_step()
    return Outcome(
        np.array(answered_at) - requests.arrivals,
        np.array(answers),
        sum(replica.busy for replica in fleet.replicas),
        sum(replica.steps for replica in fleet.replicas),
        sum(replica.stepped for replica in fleet.replicas),
        max(answered_at, default=0.0),
    )


def capacity(network: Network, tokens: Ids, exits: Ids) -> float:
    """Answers a second of one replica that always has requests, drawn from rows (tokens, exits) [rows]."""
    drawn = np.random.default_rng(0).integers(0, len(tokens), BACKLOG)
    requests = Requests(np.zeros(BACKLOG), tokens[drawn], exits[drawn])
    return BACKLOG / simulate(network, requests, 1).end


def poisson_arrivals(rate: float, count: int, random: np.random.Generator) -> Floats:
    """Arrival times of requests that do not depend on each other, `rate` a second on average [count]."""
    return random.exponential(1 / rate, count).cumsum()


def tenant_arrivals(
    rate: float,
    count: int,
    random: np.random.Generator,
    *,
    tenants: int = 100,
    exponent: float = 1.1,
    on: float = 0.25,
    off: float = 0.75,
) -> Floats:
    """Arrival times of requests of tenants that switch on and off, `rate` a second on average [requests].

    The rate of tenant k is proportional to k ** -exponent; a tenant sends only while it is on. on, off: mean
    seconds of both (exponential). Times are stretched so that the mean rate is exact; about `count` come.
    """
    seconds, shares = count / rate, np.arange(1.0, tenants + 1) ** -exponent
    shares *= rate * (on + off) / on / shares.sum()
    parts = []
    for share in shares.tolist():
        at, is_on = 0.0, random.random() < on / (on + off)
        while at < seconds:
            length = min(random.exponential(on if is_on else off), seconds - at)
            if is_on:
                parts.append(at + length * random.random(random.poisson(share * length)))
            at, is_on = at + length, not is_on
    arrivals = np.sort(np.concatenate(parts))
    arrivals *= len(arrivals) / rate / seconds
    return arrivals


def network_from(costs: Mapping[str, Any], kind: str) -> Network:
    """A network from the content of a file of fleet_costs.py.

    kind: "exits", "monolith" (batches in the order of arrival, padded), or "monolith by length" (rows share a
    step as they do in the scheduler).
    """
    grid, longest = (costs["tokens"], costs["batches"]), max(costs["rows"]["tokens"])
    longest = -(-longest // LENGTH_STEP) * LENGTH_STEP

    def by_tokens(ms: Sequence[float]) -> list[float]:
        seconds: list[float] = (1e-3 * np.interp(np.arange(longest + 1), grid[0], ms)).tolist()
        return seconds

    def table(ms: Sequence[Sequence[float]]) -> list[list[float]]:
        return _table(ms, *grid, longest)

    limit, finish = costs["batches"][-1], 1e-3 * costs["row"]
    if kind == "exits":
        begin, steps = table(costs["begin"]), [table(ms) for ms in costs["steps"]]
        return Network(
            begin, steps, by_tokens(costs["join"]), by_tokens(costs["split"]), finish, limit, pads_alone=True
        )
    nothing, free = [[0.0] * (limit + 1)] * (longest + 1), [0.0] * (longest + 1)
    mixed = kind == "monolith"
    rows = limit if mixed else ROWS
    return Network(nothing, [table(costs["monolith"])], free, free, finish, limit, rows, mixed)


def _table(
    ms: Sequence[Sequence[float]], tokens: Sequence[int], batches: Sequence[int], longest: int
) -> list[list[float]]:
    """Seconds [longest + 1][rows + 1] from milliseconds [tokens, batches], linear between measured ones."""
    measured = np.array(ms)
    by_rows = np.array([np.interp(np.arange(batches[-1] + 1), batches, line) for line in measured])
    columns = [np.interp(np.arange(longest + 1), tokens, column) for column in by_rows.T]
    table: list[list[float]] = (1e-3 * np.array(columns).T).tolist()
    return table
