"""Pulling bundles from a hub on this machine: equal, verified, cached, offline, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_double import TOKEN, HubDouble, Repository, connect, environment, running_hub
from tiny_bundles import CLASSIFIER

pytest.importorskip("huggingface_hub", reason="the extra hub")

from huggingface_hub import close_session, constants

from offramp.runtime import cli, load, load_classifier
from offramp.runtime.bundle import files
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
from offramp.runtime.errors import BadBundle, BadManifest, BadSignature, BundleNotFound
from offramp.runtime.hub import pull
from offramp.runtime.hub.pull import OfflineWarning, cache_folder, pull_bundle
from offramp.runtime.hub.reference import HubReference

USER_NAME = HubReference("user/name")
GRAPH = "segment_01.onnx"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rest_of_cache() -> list[str]:
    """Names in the cache of user/name that are neither commits nor the folder of references."""
    return [
        path.name
        for path in cache_folder("user/name").glob("*")
        if len(path.name) != 40 and path.name != "refs"
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """A hub that holds the tiny classifier and files that are not its own."""
    with running_hub() as double:
        connect(monkeypatch, double, tmp_path / "cache")
        monkeypatch.setattr(pull, "PAUSE", 0.0)
        double.repositories["user/name"] = Repository()
        double.repositories["user/name"].commit(
            "main", {**contents(CLASSIFIER), "other.bin": b"not of the bundle"}
        )
        yield double


def test_a_pulled_bundle_is_equal(hub: HubDouble) -> None:
    assert contents(pull_bundle(USER_NAME)) == contents(CLASSIFIER)
    assert rest_of_cache() == []


def test_a_pulled_bundle_has_no_links(hub: HubDouble) -> None:
    assert not any(path.is_symlink() for path in pull_bundle(USER_NAME).iterdir())


def test_load_answers_as_from_the_folder(hub: HubDouble) -> None:
    with load_classifier("hub:user/name") as pulled, load_classifier(CLASSIFIER) as local:
        ours, theirs = pulled("good film"), local("good film")
    assert (ours.label, ours.score, ours.exit) == (theirs.label, theirs.score, theirs.exit)


def test_ee_run_takes_a_name_with_a_revision(hub: HubDouble) -> None:
    done = CliRunner().invoke(cli.main, ["--bundle", "user/name@main"], input="good film\n")
    assert done.exit_code == cli.ALL_ANSWERED, done.stderr
    assert json.loads(done.stdout)["label"] in ("negative", "positive")


def test_a_second_load_reads_no_file(hub: HubDouble) -> None:
    pull_bundle(USER_NAME)
    hub.requests.clear()
    pull_bundle(USER_NAME)
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_full_commit_that_is_cached_needs_no_network(hub: HubDouble) -> None:
    commit = hub.repositories["user/name"].branches["main"]
    folder = pull_bundle(HubReference("user/name", commit))
    hub.requests.clear()
    assert pull_bundle(HubReference("user/name", commit)) == folder
    assert hub.requests == []


def test_branches_are_pulled_as_they_are_now(hub: HubDouble) -> None:
    first, repository = pull_bundle(USER_NAME), hub.repositories["user/name"]
    repository.commit("v2/beta", {**contents(CLASSIFIER), "x": b""})
    second = pull_bundle(HubReference("user/name", "v2/beta"))
    assert second.name == repository.branches["v2/beta"] != first.name
    assert pull_bundle(USER_NAME) == first


def test_the_signature_is_pulled(hub: HubDouble, tmp_path: Path) -> None:
    hub.repositories["user/name"].commit("main", contents(CLASSIFIER) | {SIGNATURE_NAME: b"s" * 64})
    assert (pull_bundle(USER_NAME) / SIGNATURE_NAME).read_bytes() == b"s" * 64


def test_a_required_signature_is_asked_for(hub: HubDouble, tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public.public_bytes(*form))
    with pytest.raises(BadSignature, match="not signed"):
        load("hub:user/name", require_signature=tmp_path / "key.pub")


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json"])
def test_a_changed_byte_is_refused(hub: HubDouble, name: str) -> None:
    data = bytearray((CLASSIFIER / name).read_bytes())
    data[len(data) // 2] ^= 1
    hub.changed[name] = bytes(data)
    with pytest.raises(BadBundle, match=rf"hub:user/name@main: {name} at commit .*: sha256 .*ee-push"):
        pull_bundle(USER_NAME)
    assert list(cache_folder("user/name").iterdir()) == []


def test_a_changed_byte_in_the_cache_is_refused(hub: HubDouble) -> None:
    file = pull_bundle(USER_NAME) / GRAPH
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(BadBundle, match=f"{GRAPH}: sha256"):
        load("hub:user/name")


def test_a_short_file_is_refused(hub: HubDouble) -> None:
    hub.changed[GRAPH] = (CLASSIFIER / GRAPH).read_bytes()[:-1]
    with pytest.raises(BadBundle, match=f"{GRAPH} .* bytes, the manifest has"):
        pull_bundle(USER_NAME)


@pytest.mark.parametrize("name", [GRAPH, SIGNATURE_NAME])
def test_an_endless_file_is_read_no_further_than_the_manifest_says(hub: HubDouble, name: str) -> None:
    hub.endless.add(name)
    hub.repositories["user/name"].commit("main", contents(CLASSIFIER) | {SIGNATURE_NAME: b"s" * 64})
    with pytest.raises(BadBundle, match=f"{name} .*more than [0-9,]+ bytes"):
        pull_bundle(USER_NAME)
    assert hub.sent < 32 * 2**20  # what fits in buffers of the connection, of 1 GiB
    assert rest_of_cache() == []


def test_an_endless_manifest_is_refused(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.endless.add(FILE_NAME)
    with pytest.raises(BadBundle, match=rf"manifest\.json .*more than {pull.LONGEST_MANIFEST:,} bytes"):
        pull_bundle(USER_NAME)


def test_the_longest_manifest_is_that_of_a_folder() -> None:
    assert pull.LONGEST_MANIFEST == files._LONGEST_MANIFEST


def test_a_bad_manifest_is_named_by_its_reference(hub: HubDouble) -> None:
    hub.changed[FILE_NAME] = b'{"format": 1, "unknown": 2}'
    with pytest.raises(BadManifest, match=r"^hub:user/name@main/manifest\.json: .*ee-push"):
        pull_bundle(USER_NAME)


def test_a_manifest_cannot_name_a_file_out_of_the_bundle(hub: HubDouble) -> None:
    value = json.loads((CLASSIFIER / FILE_NAME).read_text())
    value["files"]["../evil"] = {"sha256": "0" * 64, "bytes": 1}
    hub.changed[FILE_NAME] = json.dumps(value).encode()
    with pytest.raises(BadManifest, match="not a plain file name"):
        pull_bundle(USER_NAME)


def test_a_bundle_that_is_larger_than_the_disk_is_not_begun(hub: HubDouble) -> None:
    value = json.loads((CLASSIFIER / FILE_NAME).read_text())
    value["files"][GRAPH]["bytes"] = 2**31 - 1
    for number in range(1 << 12):
        value["files"][f"more_{number}"] = {"sha256": "0" * 64, "bytes": 2**28}
    hub.changed[FILE_NAME] = json.dumps(value).encode()
    with pytest.raises(BundleNotFound, match=r"bytes, and the disk of .* has .* left"):
        pull_bundle(USER_NAME)
    assert all(request.port == "hub" for request in hub.requests)


def test_a_connection_that_breaks_off_is_taken_up_again(hub: HubDouble) -> None:
    hub.broken |= {GRAPH: 2, FILE_NAME: 1}
    assert contents(pull_bundle(USER_NAME)) == contents(CLASSIFIER)


def test_a_connection_that_always_breaks_off_is_an_error(hub: HubDouble) -> None:
    hub.broken[GRAPH] = 1 << 10
    with pytest.raises(BundleNotFound, match=r"cannot be reached .*check the network"):
        pull_bundle(USER_NAME)
    assert rest_of_cache() == []


def test_offline_the_cached_bundle_is_used(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull_bundle(USER_NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert pull_bundle(USER_NAME) == folder
    load("hub:user/name").close()
    assert hub.requests == []


def test_offline_without_a_cached_bundle_is_an_error(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BundleNotFound, match=r"not in the cache .*HF_HUB_OFFLINE forbids to ask the hub; unset it"
    ):
        load("hub:user/name")


def test_without_a_network_the_cached_bundle_is_used_with_a_warning(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull_bundle(USER_NAME)
    hub.status = 503
    with pytest.warns(OfflineWarning, match=f"cannot be reached .*commit {folder.name}"):
        assert pull_bundle(USER_NAME) == folder


def test_another_revision_is_never_used_instead(hub: HubDouble) -> None:
    pull_bundle(USER_NAME)
    hub.status = 503
    with pytest.raises(BundleNotFound, match=r"hub:user/name@v2 is not in the cache .*answers 503"):
        pull_bundle(HubReference("user/name", "v2"))


def test_ee_run_says_in_one_line_that_the_cached_bundle_is_used(hub: HubDouble) -> None:
    pull_bundle(USER_NAME)
    hub.status = 503
    done = CliRunner().invoke(cli.main, ["--bundle", "hub:user/name"], input="good film\n")
    assert done.exit_code == cli.ALL_ANSWERED
    assert done.stderr.startswith("ee-run: hub:user/name@main: the hub cannot be reached")
    assert done.stderr.count("\n") == 1


def test_a_hub_that_is_not_there_is_an_error(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(BundleNotFound, match=r"cannot be reached .*check the network") as raised:
        pull_bundle(USER_NAME)
    assert "\n" not in str(raised.value)


def test_a_missing_repository(hub: HubDouble) -> None:
    with pytest.raises(
        BundleNotFound, match=r"^user/nothing: the hub has no such repository, or it is private"
    ):
        pull_bundle(HubReference("user/nothing"))


def test_a_repository_that_is_gone_is_an_error_though_it_is_cached(hub: HubDouble) -> None:
    folder = pull_bundle(USER_NAME)
    del hub.repositories["user/name"]
    with pytest.raises(BundleNotFound, match="the hub has no such repository"):
        pull_bundle(USER_NAME)
    assert pull_bundle(HubReference("user/name", folder.name)) == folder


def test_a_missing_revision(hub: HubDouble) -> None:
    with pytest.raises(BundleNotFound, match="user/name: it has no revision v9; name a branch"):
        pull_bundle(HubReference("user/name", "v9"))


def test_a_repository_without_a_bundle(hub: HubDouble) -> None:
    hub.repositories["user/name"].commit("main", {"README.md": b"hello"})
    with pytest.raises(BundleNotFound, match=r"hub:user/name@main: not a complete bundle.*ee-push"):
        pull_bundle(USER_NAME)


def test_a_bundle_with_a_file_missing(hub: HubDouble) -> None:
    repository = hub.repositories["user/name"]
    repository.commit("main", {name: data for name, data in hub.files("user/name").items() if name != GRAPH})
    with pytest.raises(BundleNotFound, match="not a complete bundle"):
        pull_bundle(USER_NAME)
    assert rest_of_cache() == []


def test_a_private_repository_needs_a_token(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repositories["user/name"].private = True
    with pytest.raises(BundleNotFound, match=r"or it is private.*hf auth login, or set HF_TOKEN"):
        pull_bundle(USER_NAME)
    connect(monkeypatch, hub, tmp_path / "cache", token=TOKEN)
    assert contents(pull_bundle(USER_NAME)) == contents(CLASSIFIER)


def test_the_token_goes_to_the_hub_alone(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(monkeypatch, hub, tmp_path / "cache", token=TOKEN)
    pull_bundle(USER_NAME)
    assert {(request.port, request.token) for request in hub.requests} == {("hub", TOKEN), ("storage", None)}


def test_errors_never_show_the_token(hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect(monkeypatch, hub, tmp_path / "cache", token=TOKEN)
    hub.status = 403
    with pytest.raises(ValueError, match=r"answers 403 .*hf auth login") as raised:
        pull_bundle(USER_NAME)
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize("commit", ["", "../../evil", "main"])
def test_a_commit_that_is_none_is_refused(hub: HubDouble, commit: str) -> None:
    hub.wrong_commit = commit or "none"
    with pytest.raises(BundleNotFound, match="names no commit; check that HF_ENDPOINT is a model hub"):
        pull_bundle(USER_NAME)


def test_a_commit_is_not_replaced_by_another(hub: HubDouble) -> None:
    commit, hub.wrong_commit = hub.repositories["user/name"].branches["main"], "a" * 40
    with pytest.raises(BadBundle, match=f"the hub answers with commit {'a' * 40}"):
        pull_bundle(HubReference("user/name", commit))


def test_the_first_of_two_pulls_gives_the_folder(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    once = pull._download_files

    def pull_between(*arguments: object) -> None:
        monkeypatch.setattr(pull, "_download_files", once)
        pull_bundle(USER_NAME)  # by another process, from beginning to end
        once(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pull, "_download_files", pull_between)
    assert contents(pull_bundle(USER_NAME)) == contents(CLASSIFIER)
    assert rest_of_cache() == []


def test_folders_of_killed_pulls_are_removed_after_a_day(hub: HubDouble) -> None:
    old, new = (cache_folder("user/name") / f"{pull.UNFINISHED}{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / GRAPH).write_bytes(b"half")
    for path in (old / GRAPH, old):
        os.utime(path, (0, time.time() - pull.LEFT_AFTER - 60))
    pull_bundle(USER_NAME)
    assert rest_of_cache() == [new.name]


def test_a_cache_that_cannot_be_written(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BundleNotFound, match=r"the cache .* cannot be written: .*set HF_HOME"):
        pull_bundle(USER_NAME)


@pytest.mark.slow
def test_processes_that_pull_at_once_and_offline(hub: HubDouble, tmp_path: Path) -> None:
    names = environment(hub, tmp_path / "home")
    command = [sys.executable, "-m", "offramp.runtime.cli", "--bundle", "user/name@main", "--threads", "1"]

    def start(**more: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=names | more, cwd=tmp_path)

    running = [start() for _ in range(3)]
    results = [process.communicate(b"good film\n") for process in running]
    assert [process.returncode for process in running] == [0] * 3, results
    (commits,) = (tmp_path / "home" / "assets" / "offramp").iterdir()
    assert sorted(path.name for path in commits.iterdir()) == sorted(
        ["refs", hub.repositories["user/name"].branches["main"]]
    )
    hub.requests.clear()
    offline = start(HF_HUB_OFFLINE="1")
    out, errors = offline.communicate(b"good film\n")
    assert (offline.returncode, errors, hub.requests) == (0, b"", [])
    assert json.loads(out)["label"] == json.loads(results[0][0])["label"]
    shutil.rmtree(tmp_path / "home")
    offline = start(HF_HUB_OFFLINE="1")
    assert b"HF_HUB_OFFLINE forbids" in offline.communicate(b"x\n")[1]


def damage_missing(folder: Path) -> None:
    (folder / GRAPH).unlink()


def damage_cut(folder: Path) -> None:
    (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:100])


def damage_no_manifest(folder: Path) -> None:
    (folder / FILE_NAME).unlink()


def damage_empty_manifest(folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(b"")


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    "damage", [damage_missing, damage_cut, damage_no_manifest, damage_empty_manifest, shutil.rmtree]
)
def test_a_cached_bundle_that_is_not_whole_is_pulled_again(
    hub: HubDouble, damage: Callable[[Path], None], pinned: bool
) -> None:
    commit = hub.repositories["user/name"].branches["main"]
    reference = HubReference("user/name", commit) if pinned else USER_NAME
    damage(pull_bundle(reference))
    assert contents(pull_bundle(reference)) == contents(CLASSIFIER)
    assert rest_of_cache() == []


@pytest.mark.parametrize("pinned", [False, True])
def test_offline_a_cached_bundle_that_is_not_whole_is_named(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    commit = hub.repositories["user/name"].branches["main"]
    reference = HubReference("user/name", commit) if pinned else USER_NAME
    folder = pull_bundle(reference)
    damage_cut(folder)
    before = contents(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pull, "PAUSE", 3600.0)  # it does not ask again
    close_session()
    with pytest.raises(BundleNotFound, match=f"{commit}, is not whole, and .*HF_HUB_OFFLINE forbids"):
        pull_bundle(reference)
    assert contents(folder) == before and rest_of_cache() == []
