"""A bundle that generates text, without torch: sessions, ee-run and ee-bench on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from offramp.runtime import BadSetting, load
from offramp.runtime.cli import main as run
from offramp.runtime.generator import Writer

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


def test_warm_up_and_what_a_writer_tells() -> None:
    with load(WRITER, rule="speculative") as session:
        session.warm_up([3, 500])
        assert isinstance(session, Writer) and session.folder == WRITER
        assert session.engine.facts["threads"] and session.drafting is not None
    with load(WRITER, rule="never") as session:
        assert isinstance(session, Writer) and session.drafting is None
