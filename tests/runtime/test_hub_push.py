"""ee-push to a hub on this machine: what is uploaded, what is kept, what is refused, and the way back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_double import TOKEN, HubDouble, Repository, connect, running_hub
from tiny_bundles import CLASSIFIER, GENERATOR

pytest.importorskip("huggingface_hub", reason="the extra hub")

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import SIGNATURE_NAME
from offramp.runtime.hub.card import model_card
from offramp.runtime.hub.pull import pull_bundle
from offramp.runtime.hub.push import MESSAGE, main
from offramp.runtime.hub.reference import HubReference

# huggingface_hub itself sends files in a way of httpx that is no longer its recommended one.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ATTRIBUTES, CARD = ".gitattributes", "README.md"


def push(*words: str, bundle: Path = CLASSIFIER) -> Result:
    """Run ee-push; it must end by itself."""
    done = CliRunner().invoke(main, [str(bundle), *words])
    assert isinstance(done.exception, (SystemExit, type(None))), done.exception
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """A hub without repositories, on which the user may write."""
    with running_hub() as double:
        connect(monkeypatch, double, tmp_path / "cache", token=TOKEN)
        yield double


@pytest.mark.parametrize("bundle", [CLASSIFIER, GENERATOR])
def test_a_bundle_comes_back_equal(hub: HubDouble, bundle: Path) -> None:
    done = push("user/name", "--create", bundle=bundle)
    assert done.exit_code == 0, done.output
    assert contents(pull_bundle(HubReference("user/name"))) == contents(bundle)


def test_the_manifests_files_and_a_card_are_pushed_and_nothing_else(hub: HubDouble, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (folder / "secret.txt").write_text("mine")
    assert push("user/name", "--create", bundle=folder).exit_code == 0
    assert hub.files("user/name").keys() - {ATTRIBUTES} == {*contents(CLASSIFIER), CARD}


def test_a_push_is_one_commit(hub: HubDouble) -> None:
    push("user/name", "--create")
    assert len(hub.repositories["user/name"].commits) == 2  # the first is that of a new repository


def test_standard_output_is_the_address_and_the_command(hub: HubDouble) -> None:
    done = push("hub:user/name", "--create")
    commit = hub.repositories["user/name"].branches["main"]
    assert done.stdout == f"{hub.url}/user/name\nee-run --bundle hub:user/name@{commit} input.txt\n"
    assert TOKEN not in done.output


def test_a_repository_that_is_missing_is_not_made_unasked(hub: HubDouble) -> None:
    done = push("user/name")
    assert (done.exit_code, done.stdout, hub.repositories) == (2, "", {})
    assert "the hub has no such repository" in done.stderr and "--create makes what is missing" in done.stderr


def test_create_of_a_repository_that_exists_adds_a_commit(hub: HubDouble) -> None:
    push("user/name", "--create")
    assert push("user/name", "--create", "--card").exit_code == 0


def test_a_private_repository(hub: HubDouble) -> None:
    assert push("user/name", "--create", "--private").exit_code == 0
    assert hub.repositories["user/name"].private


def test_a_public_repository_gets_nothing_that_should_be_private(hub: HubDouble) -> None:
    push("user/name", "--create")
    done = push("user/name", "--create", "--private")
    assert done.exit_code == 2 and "it exists and is public" in done.stderr
    assert len(hub.repositories["user/name"].commits) == 2


def test_private_alone_is_a_wrong_option(hub: HubDouble) -> None:
    assert "give it with --create" in push("user/name", "--private").stderr


def test_a_branch_is_made_with_create(hub: HubDouble) -> None:
    done = push("user/name", "--create", "--revision", "v2")
    assert done.stdout.startswith(f"{hub.url}/user/name/tree/v2\n")
    assert hub.files("user/name").keys() == {ATTRIBUTES}
    assert contents(pull_bundle(HubReference("user/name", "v2"))) == contents(CLASSIFIER)


def test_a_branch_that_is_missing_is_an_error(hub: HubDouble) -> None:
    push("user/name", "--create")
    done = push("user/name@v2")
    assert done.exit_code == 2
    assert "user/name: it has no revision v2" in done.stderr and "--create makes" in done.stderr


def test_two_branches_are_a_wrong_option(hub: HubDouble) -> None:
    assert "both name a branch" in push("user/name@v1", "--revision", "v2").stderr


def test_a_card_that_is_there_is_kept(hub: HubDouble) -> None:
    hub.repositories["user/name"] = Repository()
    hub.repositories["user/name"].commit("main", {CARD: b"mine"})
    done = push("user/name")
    assert (done.exit_code, hub.files("user/name")[CARD]) == (0, b"mine")
    assert "README.md of user/name is kept; --card replaces it" in done.stderr


def test_card_replaces_the_card(hub: HubDouble) -> None:
    hub.repositories["user/name"] = Repository()
    hub.repositories["user/name"].commit("main", {CARD: b"mine"})
    assert push("user/name", "--card").exit_code == 0
    expected = model_card(open_bundle(CLASSIFIER).manifest, "user/name")
    assert hub.files("user/name")[CARD].decode() == expected


def test_a_signature_is_pushed_and_that_of_another_manifest_removed(hub: HubDouble, tmp_path: Path) -> None:
    signed = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (signed / SIGNATURE_NAME).write_bytes(b"s" * 64)
    push("user/name", "--create", bundle=signed)
    assert hub.files("user/name")[SIGNATURE_NAME] == b"s" * 64
    assert push("user/name").exit_code == 0
    assert SIGNATURE_NAME not in hub.files("user/name")


def test_a_changed_bundle_is_not_pushed(hub: HubDouble, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    with (folder / "stem.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    done = push("user/name", "--create", bundle=folder)
    assert done.exit_code == 2 and "stem.onnx: sha256" in done.stderr
    assert hub.requests == []


def test_a_folder_that_is_no_bundle_is_not_pushed(hub: HubDouble, tmp_path: Path) -> None:
    done = push("user/name", "--create", bundle=tmp_path)
    assert done.exit_code == 2 and "not a bundle" in done.stderr
    assert hub.requests == []


def test_a_name_that_is_none_is_refused(hub: HubDouble) -> None:
    assert "write user/name" in push("name", "--create").stderr


@pytest.mark.parametrize("words", [["--create"], []])
def test_without_a_token_nothing_is_pushed(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    hub.repositories["user/name"] = Repository()
    hub.repositories["user/name"].commit("main", {})
    connect(monkeypatch, hub, tmp_path / "cache")
    done = push("user/name", *words)
    assert done.exit_code == 2 and "log in with: hf auth login, or set HF_TOKEN" in done.stderr
    assert done.stderr.count("\n") == 2  # what it does, and why it did not
    assert hub.files("user/name") == {}


def test_a_hub_that_does_not_answer(hub: HubDouble) -> None:
    hub.status = 501
    done = push("user/name", "--create")
    assert done.exit_code == 2 and "nothing was pushed" in done.stderr and "answers 501" in done.stderr


def test_the_message_is_that_of_the_commit(hub: HubDouble) -> None:
    push("user/name", "--create")
    push("user/name", "--message", "second try")
    assert hub.repositories["user/name"].messages == ["", MESSAGE, "second try"]
