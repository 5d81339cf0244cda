"""SECURITY.md: every threat names a test that exists, and numbers are those of its section."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hostile_attacks import ATTACKS, of_kind

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ALIAS = {"hostile": "tests/hostile/test_bundles.py::test_hostile_bundle_is_refused"}
ROW = re.compile(r"^\| T(\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)


def threats(text: str = TEXT) -> dict[int, list[str]]:
    """Tests that each threat names, as file::function."""
    rows: dict[int, list[str]] = {}
    for number, cell in ROW.findall(text):
        assert int(number) not in rows, f"T{number} is there twice"
        rows[int(number)] = [ALIAS.get(name, name) for name in re.findall(r"`([^`]+)`", cell)]
    return rows


def has_test(name: str) -> bool:
    """Whether file::function is a test of this checkout."""
    file, _, function = name.partition("::")
    if not file.startswith("tests/") or not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
def test_every_threat_names_tests_that_exist() -> None:
    missing = {
        f"T{number}": names
        for number, names in threats().items()
        if not names or not all(map(has_test, names))
    }
    assert missing == {}


def test_threats_stand_in_the_section_of_their_number() -> None:
    parts = re.split(r"^## .*\(T(\d+)-T(\d+)\)$", TEXT, flags=re.MULTILINE)[1:]
    assert len(parts) == 9
    for first, last, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        numbers = list(threats(text))
        assert numbers == sorted(numbers) and all(int(first) <= number <= int(last) for number in numbers)


def test_every_attack_has_its_threat_and_every_threat_of_attacks_has_some() -> None:
    assert {attack.threat for attack in ATTACKS} <= set(threats())
    without = [
        number for number, names in threats().items() if ALIAS["hostile"] in names and not of_kind(number)
    ]
    assert without == []
