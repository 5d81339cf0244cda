"""benchmarks/fleet*.py: the simulation against closed forms and the walker; costs, tables and the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, DATA, texts

from offramp.benchmarks import fleet, fleet_costs, fleet_pages, fleet_sim
from offramp.benchmarks.fleet_costs import grid_of
from offramp.benchmarks.fleet_sim import (
    BALANCERS,
    Network,
    Requests,
    capacity,
    network_from,
    poisson_arrivals,
    simulate,
    tenant_arrivals,
)
from offramp.runtime import load_classifier
from offramp.runtime.serving.scheduler import RowOptions, Scheduler

BASELINES = DATA / "tiny_baselines"
SERVICE = 0.01  # seconds of a step in the networks of these tests


def network(segments: int = 1, limit: int = 1, **options: Any) -> Network:
    """Steps that take SERVICE for each row, and nothing else that takes time."""
    table = [[SERVICE * rows for rows in range(limit + 1)] for _ in range(33)]
    free = [[0.0] * (limit + 1) for _ in range(33)]
    return Network(free, [table] * segments, [0.0] * 33, [0.0] * 33, 0.0, limit, **options)


def requests(count: int, rate: float, seed: int, exits: int = 1) -> Requests:
    random = np.random.default_rng(seed)
    arrivals = poisson_arrivals(rate, count, random)
    return Requests(arrivals, random.integers(4, 30, count), random.integers(0, exits, count))


def waiting(outcome_seconds: np.ndarray, service: float = SERVICE) -> tuple[float, float]:
    """Mean waiting behind a warm-up, and its standard error from the means of 20 batches of requests."""
    waits = outcome_seconds[len(outcome_seconds) // 10 :] - service
    means = np.array([part.mean() for part in np.array_split(waits, 20)])
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_replica_with_fixed_costs_is_the_queue_m_d_1(load: float) -> None:
    outcome = simulate(network(), requests(40_000, load / SERVICE, 0), 1)
    mean, error = waiting(outcome.seconds)
    expected = load * SERVICE / (2 * (1 - load))  # Pollaczek-Khinchine
    assert abs(mean - expected) < 4 * error < 0.3 * expected


@pytest.mark.slow
def test_one_replica_with_random_depth_is_the_queue_m_g_1() -> None:
    # With one row under way at once, a row of depth d takes d steps without others between them.
    asked = requests(40_000, 0.7 / (2.5 * SERVICE), 1, exits=4)
    outcome = simulate(network(segments=4, rows=1), asked, 1)
    service = SERVICE * (asked.exits + 1)
    mean, error = waiting(outcome.seconds - service, 0.0)
    expected = 0.7 * float((service**2).mean() / service.mean()) / (2 * 0.3)
    assert abs(mean - expected) < 4 * error < 0.5 * expected


@pytest.mark.slow
def test_round_robin_waits_less_than_one_replica_and_more_than_the_shortest_queue() -> None:
    asked = requests(20_000, 0.8 / (2.5 * SERVICE), 2, exits=4)
    halved = Requests(asked.arrivals / 2, asked.tokens, asked.exits)
    walked, service = network(segments=4, rows=1), SERVICE * (asked.exits + 1)
    shortest, robin = (
        waiting(simulate(walked, halved, 2, name).seconds - service, 0.0)[0] for name in BALANCERS
    )
    assert shortest < robin < waiting(simulate(walked, asked, 1).seconds - service, 0.0)[0]


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("replicas", [1, 7])
@pytest.mark.parametrize("mixed", [False, True])
def test_every_request_is_answered_once(balancer: str, replicas: int, mixed: bool) -> None:
    walked, asked = (
        network(4, 8, mixed=mixed, rows=16),
        requests(2000, 1.2 * replicas / (2.5 * SERVICE), 3, 4),
    )
    outcome = simulate(walked, asked, replicas, balancer)
    assert (outcome.answers == 1).all() and outcome.stepped == (asked.exits + 1).sum()
    assert outcome.busy == pytest.approx(SERVICE * outcome.stepped)
    assert (outcome.seconds >= walked.seconds_alone(asked.tokens, asked.exits) - 1e-9).all()


def test_a_lone_request_takes_its_time_alone() -> None:
    outcome = simulate(network(4), Requests(np.array([5.0]), np.array([9]), np.array([2])), 3)
    assert outcome.seconds[0] == pytest.approx(3 * SERVICE)


def test_steps_are_shared_and_cost_what_the_table_says() -> None:
    # Eight rows of one length come together: one step a segment, of those that are left.
    exits = np.repeat([0, 1, 1, 3], 2)
    outcome = simulate(network(4, 8), Requests(np.zeros(8), np.full(8, 16), exits), 1)
    assert (outcome.steps, outcome.stepped) == (4, (exits + 1).sum())
    assert sorted(set(outcome.seconds.round(6).tolist())) == pytest.approx([0.08, 0.14, 0.18])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 4, 32])
def test_steps_are_those_of_the_scheduler(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int, int]] = []
    with load_classifier(CLASSIFIER, batch_size=limit) as session:
        _, rows, exits = tiny_rows(session)
        step = session.engine.step

        def noted(segment: int, variant: int, state: Any) -> Any:
            steps.append((segment, state.length, state.rows))
            return step(segment, variant, state)

        monkeypatch.setattr(session.engine, "step", noted)
        with session.walking():  # the thread waits until all rows have come
            scheduler = Scheduler(session, limit=limit)
            futures = [scheduler.submit(row, RowOptions(*session.draw())) for row in rows]
        for future in futures:
            future.result(20)
        scheduler.close()
    simulated: list[tuple[int, int, int]] = []
    tables = [_Noted(segment, simulated) for segment in range(3)]
    begin = [[1e-9] * (limit + 1)] * 200  # no two batches begin at the same time
    walked = Network(begin, tables, [0.0] * 200, [0.0] * 200, 0.0, limit, pads_alone=True)  # type: ignore[arg-type]
    tokens = np.array([row.length for row in rows])
    simulate(walked, Requests(np.zeros(len(rows)), tokens, np.array(exits)), 1)
    assert first_difference(simulated, steps) is None


class _Noted:
    """In place of a segment's table of costs: notes the steps for which a cost is asked."""

    def __init__(self, segment: int, steps: list[tuple[int, int, int]], tokens: int | None = None) -> None:
        self._segment, self._steps, self._tokens = segment, steps, tokens

    def __getitem__(self, index: int) -> Any:
        if self._tokens is None:
            return _Noted(self._segment, self._steps, index)
        self._steps.append((self._segment, self._tokens, index))
        return 1e-6


def tiny_rows(session: Any) -> tuple[list[str], list[Any], list[int]]:
    """Texts of the tiny bundle, their rows, and where they leave."""
    items = texts(120, seed=5)
    return items, session.read(items), [session(item).exit - 1 for item in items]


def first_difference(left: list[Any], right: list[Any]) -> Any:
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next(((i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]), (len(left), len(right)))


def test_rows_that_begin_alone_share_steps_with_others_if_they_are_padded() -> None:
    # A long step, in which rows of 17 and of 18 tokens come one after another, each alone.
    tables = [[[0.0, *[SERVICE] * 8]] * 33] * 2
    walked = Network([[SERVICE] * 9] * 33, tables, [0.0] * 33, [0.0] * 33, 0.0, 8)
    asked = Requests(np.array([0.0, 0.005, 0.025]), np.array([30, 17, 18]), np.array([1, 1, 1]))
    steps = [simulate(replace(walked, pads_alone=pads), asked, 1).steps for pads in (False, True)]
    assert steps == [6, 4]


def test_bursts_have_the_rate_that_is_asked_for_and_vary_more_than_poisson() -> None:
    random = np.random.default_rng(0)
    kinds = [make(200.0, 20_000, random) for make in (poisson_arrivals, tenant_arrivals)]
    variances = []
    for times in kinds:
        assert len(times) / times[-1] == pytest.approx(200, rel=0.05) and (np.diff(times) >= 0).all()
        counts = np.histogram(times, int(times[-1]))[0]
        variances.append(counts.var() / counts.mean())
    assert variances[0] == pytest.approx(1, abs=0.5) and variances[1] > 5


def test_batches_raise_the_capacity_only_where_rows_share_costs() -> None:
    tokens, exits = np.full(100, 16), np.zeros(100, np.int64)
    assert capacity(network(limit=8), tokens, exits) == pytest.approx(1 / SERVICE)
    shared = [[0.0, *[SERVICE] * 8]] * 33
    flat = Network([[0.0] * 9] * 33, [shared], [0.0] * 33, [0.0] * 33, 0.0, 8)
    assert capacity(flat, tokens, exits) == pytest.approx(8 / SERVICE, rel=0.01)


def test_lengths_of_the_grid_are_multiples_between_the_shortest_and_the_longest_row() -> None:
    assert grid_of([5, 9, 14]) == [8, 16]
    assert grid_of([3, 100], 4) == [8, 40, 72, 104]


def test_fewest_replicas() -> None:
    assert fleet.fewest(lambda count: count >= 37, 12) == 37
    assert fleet.fewest(lambda count: True, 12) == 12
    assert fleet.fewest(lambda count: False, 2) is None


def test_figures_are_joined_over_seeds() -> None:
    lines = [{"kind": "exits", "p99": value, "n": n} for value, n in ((1.0, 3), (3.0, None))]
    assert fleet.over_seeds(lines, ("kind",)) == [{"kind": "exits", "p99": [2.0, 1.0], "n": None}]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all result files of the tiny bundle."""
    folder = tmp_path_factory.mktemp("results")
    data = folder / "test.jsonl"
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts(60))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--data", str(data), "--name", "tiny", "--out", str(folder)]
    measure = ["measure", str(CLASSIFIER), "--baselines", str(BASELINES), "--rounds", "1", *words]
    check = ["check", str(CLASSIFIER), "--requests", "40", *words]
    simulation = ["simulate", "tiny", "--fleets", "1,3", "--loads", "0.5,0.8", "--seeds", "2"]
    simulation += ["--requests", "300", "--out", str(folder), "--price", "0.5"]
    sizes = fleet.TENANT_SECONDS, fleet.SIZED_FOR, fleet_sim.BACKLOG
    fleet.TENANT_SECONDS, fleet.SIZED_FOR, fleet_sim.BACKLOG = 0.05, 2, 200  # seconds and not minutes
    for arguments in (measure, check, simulation):
        ended = CliRunner().invoke(fleet.main, arguments)
        assert ended.exit_code == 0, ended.output
    fleet.TENANT_SECONDS, fleet.SIZED_FOR, fleet_sim.BACKLOG = sizes
    return folder


def read(folder: Path, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{kind}_tiny.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
def test_costs_have_a_cell_for_each_length_and_batch(results: Path) -> None:
    costs = read(results, fleet_pages.COSTS)
    shape = (len(costs["tokens"]), len(costs["batches"]))
    assert np.shape(costs["begin"]) == np.shape(costs["monolith"]) == shape
    assert np.shape(costs["steps"]) == (3, *shape) and np.array(costs["steps"]).min() > 0
    assert np.shape(costs["join"]) == np.shape(costs["split"]) == shape[:1] and costs["row"] > 0


@pytest.mark.slow
def test_recorded_exits_and_lengths_are_those_of_the_session(results: Path) -> None:
    rows = read(results, fleet_pages.COSTS)["rows"]
    with load_classifier(CLASSIFIER) as session:
        assert rows["exits"] == [session(text).exit - 1 for text in texts(60)]
        assert rows["tokens"] == [row.length for row in session.read(texts(60))]


@pytest.mark.slow
def test_measured_costs_are_those_of_the_network_between_cells_too(results: Path) -> None:
    costs = read(results, fleet_pages.COSTS)
    walked = network_from(costs, "exits")
    at, last = costs["tokens"][0], len(costs["batches"]) - 1
    assert walked.steps[1][at][costs["batches"][last]] == pytest.approx(1e-3 * costs["steps"][1][0][last])
    middle = (costs["steps"][1][0][2] + costs["steps"][1][0][3]) / 2  # of 4 and 8 rows
    assert walked.steps[1][at][6] == pytest.approx(1e-3 * middle)


@pytest.mark.slow
def test_the_real_scheduler_leaves_at_the_recorded_exits(results: Path) -> None:
    lines = read(results, fleet_pages.CHECK)["lines"]
    backlog = read(results, fleet_pages.CHECK)["backlog"]
    assert backlog["scheduler_seconds"] > 0 < backlog["simulation_seconds"]
    assert [line["share"] for line in lines] == list(fleet_costs.CHECK_SHARES)
    assert all(line["other_exits"] == 0 and line["scheduler"]["mean_ms"] > 0 for line in lines)


@pytest.mark.slow
def test_each_system_has_figures_for_each_load_and_fleet(results: Path) -> None:
    result = read(results, fleet_pages.RUNS)
    assert len(result["lines"]) == 2 * 2 * 2 * 2 * 3 and len(result["needed"]) == 2 * 2 * 2 * 3
    for line in result["lines"]:
        assert 0 <= line["p50_ms"][0] <= line["p95_ms"][0] <= line["p99_ms"][0]
        assert line["wait_p50_ms"][0] >= -1e-3 and 0 < line["busy"][0] <= 1
    depths = {line["kind"]: line["depth"][0] for line in result["lines"]}
    assert depths["exits"] < depths["monolith"] == depths["monolith by length"] == 4


@pytest.mark.slow
def test_the_same_seeds_give_the_same_figures(results: Path) -> None:
    costs = read(results, fleet_pages.COSTS)
    cells = [fleet.run_cell(costs, 500.0, 300, ("tenants", 0.01, 2, BALANCERS[0], 4)) for _ in range(2)]
    assert cells[0] == cells[1]


@pytest.mark.slow
def test_costs_that_only_partly_grow_with_rows_raise_the_capacity(results: Path) -> None:
    costs = read(results, fleet_pages.COSTS) | {"row": 0.0}
    rates = [fleet.capacities(fleet.with_shared_costs(costs, share))["monolith"] for share in (1.0, 0.0)]
    assert rates[1] > 4 * rates[0]


@pytest.mark.slow
def test_tables_and_picture_are_those_of_the_results(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(fleet_pages.fleet_tables(results))
    assert "| tiny, default |" in text and "| tiny | tenants | round robin | exits |" in text
    assert "at 0.5 an hour" in text and "beside the real scheduler" in text
    monkeypatch.setattr(fleet, "PICTURE", results / "fleet.svg")
    assert CliRunner().invoke(fleet.main, ["picture", "--out", str(results)]).exit_code == 0
    assert "exits, poisson" in (results / "fleet.svg").read_text(encoding="utf-8")


def test_a_missing_file_of_costs_is_named(tmp_path: Path) -> None:
    ended = CliRunner().invoke(fleet.main, ["simulate", "absent", "--out", str(tmp_path)])
    assert ended.exit_code == 1 and "fleet_costs_absent.json: no such file" in ended.output


def test_baselines_without_the_variant_are_refused(tmp_path: Path) -> None:
    folder, data = tmp_path / "graphs", tmp_path / "test.txt"
    folder.mkdir()
    for file in BASELINES.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    listing = json.loads((BASELINES / "baselines.json").read_text(encoding="utf-8"))
    listing["graphs"] = [graph for graph in listing["graphs"] if graph["kind"] != "monolith"]
    (folder / "baselines.json").write_text(json.dumps(listing), encoding="utf-8")
    data.write_text("a film\n", encoding="utf-8")
    words = ["measure", str(CLASSIFIER), "--baselines", str(folder), "--data", str(data), "--name", "x"]
    ended = CliRunner().invoke(fleet.main, [*words, "--out", str(tmp_path)])
    assert ended.exit_code == 1 and "ee-split --baselines" in ended.output
