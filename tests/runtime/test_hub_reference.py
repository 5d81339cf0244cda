"""References to bundles on a hub: what they are, and names that no hub has."""

from __future__ import annotations

import pytest

from offramp.runtime.errors import BadSetting
from offramp.runtime.hub.reference import HubReference, is_hub_reference, parse_hub_reference


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hub:user/name", "user/name", "main"),
        ("hub:user/name@v1.0", "user/name", "v1.0"),
        ("user/a_b-c.d@refs/pr/3", "user/a_b-c.d", "refs/pr/3"),
    ],
)
def test_hub_references_are_parsed(text: str, repository: str, revision: str) -> None:
    assert parse_hub_reference(text) == HubReference(repository, revision)


@pytest.mark.parametrize(
    "text",
    [
        "hub:",
        "hub:name",
        "hub:user/name/more",
        "hub:../name",
        "hub:user/..",
        "hub:user/.name",
        "hub:us--er/name",
    ],
)
def test_names_that_no_hub_has_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="write user/name"):
        parse_hub_reference(text)


@pytest.mark.parametrize("revision", ["", "..", "a..b", ".hidden", "/etc", "a b", "a\n", "x" * 101])
def test_revisions_that_no_repository_has_are_refused(revision: str) -> None:
    with pytest.raises(BadSetting, match="not a revision"):
        parse_hub_reference(f"hub:user/name@{revision}")


def test_a_reference_is_written_as_load_takes_it() -> None:
    assert str(parse_hub_reference("user/name")) == "hub:user/name@main"


def test_a_path_is_no_reference() -> None:
    assert not is_hub_reference("./hub:user/name")
