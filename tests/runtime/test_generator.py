"""A bundle that generates text, without torch: sessions, ee-run and ee-bench on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from offramp.runtime import BadInput, BadSetting, RuleSpec, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.cli import main as run
from offramp.runtime.generate import Token
from offramp.runtime.generator import Writer
from offramp.runtime.rules.route import FILE, menu, open_routing
from offramp.runtime.sequence import Lane
from offramp.runtime.tuning.bench import main as bench
from offramp.runtime.tuning.bench_generation import by_position, measure_text, wished
from offramp.runtime.tuning.calibrate import main as calibrate
from offramp.runtime.tuning.calibrate_generation import scored

DATA = Path(__file__).parents[1] / "data"
WRITER, CLASSIFIER = DATA / "tiny_writer", DATA / "tiny_bundle"
PROMPT = "the film was good and"


def said(most: int = 20, **wishes: Any) -> list[tuple[int, int]]:
    """Token and depth of an answer."""
    with load(WRITER, **wishes) as session:
        return [(piece.token, piece.depth) for piece in session.generate(PROMPT, most)]


def test_the_bundles_own_rule_is_its_gate() -> None:
    own = said()
    assert own == said(rule="gate") == said(rule="gate", threshold=0.5) and len({d for _, d in own}) > 1
    assert {depth for _, depth in said(rule="gate", threshold=1.0)} == {3}
    assert {depth for _, depth in said(rule="gate", threshold=0.0)[1:]} == {1}


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_drafts_say_what_the_full_depth_says(variant: str) -> None:
    plain = said(40, rule="never", variant=variant)
    assert said(40, rule="speculative", variant="fp32") == said(40, rule="never")
    assert {depth for _, depth in plain} == {3} and len(plain) == 40


def test_both_caches_talk_and_differ_where_tokens_left() -> None:
    wishes: dict[str, Any] = {"rule": "gate", "threshold": 0.6}
    deferred, propagated = said(40, **wishes), said(40, **wishes, cache="propagate")
    assert deferred[0] == propagated[0] and len(propagated) == 40
    with load(WRITER, **wishes) as session:
        waited = sum(piece.ran for piece in session.generate(PROMPT, 40))
    with load(WRITER, **wishes, cache="propagate") as session:
        pieces = list(session.generate(PROMPT, 40))
    assert sum(piece.ran for piece in pieces) == sum(piece.depth for piece in pieces)
    assert waited > sum(depth for _, depth in deferred)  # who waited went on when another went deeper
    with pytest.raises(BadSetting, match="cache 'deep': choose one of"):
        load(WRITER, cache="deep")


def test_a_route_and_its_bounds() -> None:
    assert {depth for _, depth in said(rule="skip", threshold=2)[1:]} == {2}
    with pytest.raises(BadSetting, match="segments 1 is not a whole number from 2 to 3"):
        load(WRITER, rule="skip", threshold=1)
    with pytest.raises(BadSetting, match="rule 'quick' is not for bundles that generate"):
        load(WRITER, rule="quick")


def answers(*words: str, given: str) -> tuple[int, list[dict[str, Any]], str]:
    done = CliRunner().invoke(run, ["--bundle", str(WRITER), *words], input=given)
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_ee_run_drafts_and_says_so() -> None:
    code, lines, told = answers(
        "--rule", "speculative", "--stats", "--max-new-tokens", "12", given=f"{PROMPT}\na film\n"
    )
    assert code == 0 and [line["tokens"] for line in lines] == [12, 12]
    assert all(line["depth"] == 3 and line["ran"] >= 3 for line in lines)
    assert "steps without a draft" in told and "rule       speculative" in told
    assert "blocks run a token" in told


def test_ee_run_takes_messages() -> None:
    chat = {"messages": [{"role": "user", "content": "a good film"}], "max_new_tokens": 4}
    lines: list[Any] = [{"prompt": "a film", "max_new_tokens": 3}, chat, {"messages": "hello"}, {"stop": "a"}]
    code, found, _ = answers(given="".join(json.dumps(line) + "\n" for line in lines))
    assert code == 1 and [line.get("tokens") for line in found] == [3, 4, None, None]
    assert "messages: expected a list" in found[2]["error"]
    assert '"prompt": expected a string' in found[3]["error"]


def test_ee_bench_measures_rules(tmp_path: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    data.write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"prompt": "a bad plot"}) + "\n")
    words = ["--bundle", str(WRITER), "--data", str(data), "--json", str(out), "--turns", "2"]
    rules = "speculative,gate:0.5,fixed:1"
    done = CliRunner().invoke(bench, [*words, "--rules", rules, "--max-new-tokens", "10"])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text(encoding="utf-8"))
    by_name = {one["name"]: one for one in figures["contenders"]}
    assert list(by_name) == ["full depth", "speculative", "gate:0.5", "fixed:1"]
    assert by_name["full depth"]["same"] == by_name["speculative"]["same"] == 1.0
    assert by_name["full depth"]["ratio"] == 1.0 and by_name["full depth"]["depth"] == 3
    assert by_name["fixed:1"]["depth"] == 1 and by_name["fixed:1"]["ran"] == 1
    assert sum(by_name["speculative"]["drafts"]["rounds"].values()) > 0
    positions = by_name["fixed:1"]["by_position"]
    assert positions[0] == {"from": 1, "mean": 3.0, "tokens": {"3": 4}}
    assert sum(sum(line["tokens"].values()) for line in positions) == 40
    assert "mean depth from token" in done.output and "tokens/s" in done.output


def test_ee_bench_names_what_cannot_be(tmp_path: Path) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text("a film\n", encoding="utf-8")

    def told(bundle: Path, *words: str) -> str:
        done = CliRunner().invoke(bench, ["--bundle", str(bundle), "--data", str(data), *words])
        assert done.exit_code == 2
        return done.output

    assert "--points is for bundles that classify" in told(WRITER, "--points", "default")
    assert "--report is for bundles that classify" in told(WRITER, "--report", str(tmp_path / "page.html"))
    assert "--rules is for generated text" in told(CLASSIFIER, "--rules", "gate")
    assert "expected NAME or NAME:NUMBER" in told(WRITER, "--rules", "gate:high")
    data.write_text("\n", encoding="utf-8")
    assert "no lines in it" in told(WRITER)
    data.write_text('{"prompt": 7}\n', encoding="utf-8")
    assert "prompts.txt:1" in told(WRITER)
    with pytest.raises(BadInput, match="name a file of prompts"):
        measure_text(open_bundle(WRITER), tmp_path / "none")


def test_the_full_depth_always_takes_part() -> None:
    bundle = open_bundle(WRITER)
    assert list(wished(None, bundle)) == ["full depth", "gate"]
    assert list(wished("never, fixed:2", bundle)) == ["full depth", "fixed:2"]


def test_depths_by_position() -> None:
    found = by_position([[Token(7, 3, 3), Token(7, 1, 1), Token(7, 2, 2)], [Token(7, 3, 3)]])
    assert found == [
        {"from": 1, "mean": 3.0, "tokens": {3: 2}},
        {"from": 2, "mean": 1.5, "tokens": {1: 1, 2: 1}},
    ]


def test_warm_up_and_what_a_writer_tells() -> None:
    with load(WRITER, rule="speculative") as session:
        session.warm_up([3, 500])
        assert isinstance(session, Writer) and session.folder == WRITER
        assert session.engine.facts["threads"] and session.drafting is not None
    with load(WRITER, rule="never") as session:
        assert isinstance(session, Writer) and session.drafting is None


def pairs(file: Path, count: int = 24) -> Path:
    """Rows {prompt, completion}."""
    words = ["good", "bad", "film", "plot", "scene", "warm", "very", "not"]
    rows = [
        {
            "prompt": f"the {words[n % 8]} was",
            "completion": " ".join(words[(n + k * k) % 8] for k in range(6)),
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_router_is_learned_and_chooses_by_the_prompt(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(WRITER, tmp_path / "bundle"))
    with pytest.raises(BadSetting, match="has no router; learn one with: ee-calibrate"):
        load(bundle, rule=RuleSpec("route", {"price": 0.0}))
    done = CliRunner().invoke(calibrate, [str(pairs(tmp_path / "pairs.jsonl")), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    assert "skip to 2" in done.output and "exit at 2" in done.output and "error of the router" in done.output
    manifest = open_bundle(bundle).manifest
    assert manifest.points[0].name == "route-95" and FILE in manifest.files
    assert manifest.rule.name == "gate"  # the bundle's own rule stays
    for point in manifest.points:
        assert point.measured["depth"] <= 3 and point.measured["nats"] > 0
    routes = menu(manifest)
    assert [(route.name, route.blocks) for route in routes] == [
        ("full", 3),
        ("skip to 2", 2),
        ("exit at 2", 2),
    ]
    ways: dict[float, set[int]] = {}
    for price in (0.0, 1e3):
        routing = open_routing(open_bundle(bundle), price)
        depths = set()
        with load(bundle, rule=RuleSpec("route", {"price": price})) as session:
            for n in range(12):
                pieces = list(session.generate(f"the {['good', 'bad', 'film'][n % 3]} was", 5))
                assert pieces[0].depth == 3 and len({piece.depth for piece in pieces[1:]}) == 1
                depths.add(pieces[1].depth)
        ways[price] = depths
        assert routing.number(np.zeros(manifest.hidden_size, np.float32)) in range(3)
    assert ways[1e3] == {2}
    with load(bundle, point="route-60") as session:
        assert session.rule.name == "route" and list(session.generate("the film", 3))
    with pytest.raises(BadSetting, match="it has: route-95"):
        load(bundle, point="default")


def test_a_route_says_what_its_segments_say(tmp_path: Path) -> None:
    """Scores of the full route are those of one token after another."""
    with load(WRITER, rule="never") as session:
        assert isinstance(session, Writer)
        prompt, completion = session.ids_of("the film was"), session.continued("good and warm at all")
        _, scores = scored(session.decoder, menu(session.manifest), prompt, completion)
        lane = Lane(session.decoder)
        lane.feed([*prompt, *completion[:1]])
        lane.through(most=99)
        nats = []
        for now, after in zip(completion[1:], [*completion[2:], None], strict=True):
            lane.feed([now])
            logits = lane.cache.logits(lane.through().hidden)[0]
            if after is not None:
                nats.append(float(np.log(np.exp(logits).sum()) - logits[after]))
        first = Lane(session.decoder)
        first.feed([*prompt, completion[0]])
        logits = first.cache.logits(first.through(most=99).hidden[-1:])[0]
        nats.insert(0, float(np.log(np.exp(logits).sum()) - logits[completion[1]]))
    assert scores[0] == pytest.approx(-float(np.mean(nats)), abs=1e-4)
    assert len(set(scores)) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "line 1: field 'prompt' is missing"),
        ('{"prompt": 1, "completion": "a"}', "line 1: prompt and completion must be texts"),
        ("nothing", "line 1: Expecting value"),
        ('{"prompt": "a film", "completion": "was good"}', "1 rows with a prompt and two tokens behind it"),
    ],
)
def test_pairs_that_cannot_be(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(line + "\n", encoding="utf-8")
    done = CliRunner().invoke(calibrate, [str(tmp_path / "pairs.jsonl"), "--bundle", str(WRITER)])
    assert done.exit_code == 2 and said in done.output
    done = CliRunner().invoke(
        calibrate, [str(tmp_path / "pairs.jsonl"), "--bundle", str(WRITER), "--rule", "gate"]
    )
    assert done.exit_code == 2 and "--rule is for bundles that classify" in done.output
