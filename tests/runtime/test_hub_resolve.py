"""From references to folders: what is a folder, what is on the hub, and what is neither."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER

from offramp.runtime import cli, load
from offramp.runtime.errors import BadSetting, BundleNotFound
from offramp.runtime.hub.resolve import require_folder, resolve_bundle


def test_a_folder_is_itself() -> None:
    assert resolve_bundle("bundle/") == "bundle/"
    assert resolve_bundle(CLASSIFIER, command=True) == CLASSIFIER


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name@main").mkdir(parents=True)
    assert resolve_bundle("user/name@main", command=True) == "user/name@main"


def test_load_reads_a_name_without_the_prefix_as_a_folder() -> None:
    with pytest.raises(BundleNotFound, match="user/name@main: no such folder"):
        load("user/name@main")


def test_a_command_names_the_hub_for_a_folder_that_is_missing() -> None:
    with pytest.raises(BundleNotFound, match=r"user/name: no such folder; .*hub:user/name if it is"):
        resolve_bundle("user/name", command=True)


def test_a_mistyped_path_asks_no_hub() -> None:
    assert resolve_bundle("a/b/c@d", command=True) == "a/b/c@d"


def test_commands_that_write_refuse_the_hub() -> None:
    with pytest.raises(
        BadSetting, match=r"ee-calibrate writes .* hf download user/name --revision v1 --local-dir"
    ):
        require_folder("hub:user/name@v1", "ee-calibrate")
    assert require_folder("bundle/", "ee-calibrate") == Path("bundle")


def test_the_extra_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadSetting, match=r"pip install 'offramp\[hub\]'"):
        load("hub:user/name")


def test_ee_run_names_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = CliRunner().invoke(cli.main, ["--bundle", "user/name@main"], input="x\n")
    assert done.exit_code == cli.NOT_STARTED
    assert "user/name@main: no such folder, and as a bundle on the hub: " in done.stderr
    assert "pip install 'offramp[hub]'" in done.stderr and done.stderr.count("\n") == 1
