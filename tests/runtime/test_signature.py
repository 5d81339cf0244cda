"""Signatures of bundles: required, valid, by another key, of another manifest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from tiny_bundles import CLASSIFIER

from offramp.export import sign
from offramp.runtime import load
from offramp.runtime.bundle import signature
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
from offramp.runtime.cli import main
from offramp.runtime.errors import BadSetting, BadSignature
from offramp.runtime.loading import load_classifier

PEM = serialization.Encoding.PEM
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo


def public_key(secret: ed25519.Ed25519PrivateKey, path: Path) -> Path:
    path.write_bytes(secret.public_key().public_bytes(PEM, PUBLIC))
    return path


@pytest.fixture
def secret() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


@pytest.fixture
def key(secret: ed25519.Ed25519PrivateKey, tmp_path: Path) -> Path:
    return public_key(secret, tmp_path / "key.pub")


@pytest.fixture
def signed(secret: ed25519.Ed25519PrivateKey, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    (folder / SIGNATURE_NAME).write_bytes(secret.sign((folder / FILE_NAME).read_bytes()))
    return folder


def test_signed_bundle_is_opened(signed: Path, key: Path) -> None:
    with load(signed, require_signature=key) as session:
        assert session.manifest == open_bundle(CLASSIFIER).manifest


def test_signed_bundle_is_opened_without_a_key(signed: Path) -> None:
    load(signed).close()


def test_unsigned_bundle_is_refused(key: Path) -> None:
    with pytest.raises(BadSignature, match=r"not signed, it has no manifest\.json\.sig.*key\.pub"):
        load(CLASSIFIER, require_signature=str(key))


def test_load_classifier_requires_the_signature(key: Path) -> None:
    with pytest.raises(BadSignature):
        load_classifier(CLASSIFIER, require_signature=key)


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = public_key(ed25519.Ed25519PrivateKey.generate(), tmp_path / "other.pub")
    with pytest.raises(BadSignature, match="another key signed it, or it was changed"):
        open_bundle(signed, other)


def test_changed_manifest_is_refused_before_it_is_read(signed: Path, key: Path) -> None:
    (signed / FILE_NAME).write_bytes(b"\xff no JSON")
    with pytest.raises(BadSignature):
        open_bundle(signed, key)


def test_changed_file_of_a_signed_bundle_is_refused(signed: Path, key: Path) -> None:
    shutil.copy(signed / "segment_01.onnx", signed / "segment_00.onnx")
    with pytest.raises(ValueError, match=r"segment_00\.onnx"):
        open_bundle(signed, key).verify()


@pytest.mark.parametrize("data", [b"", b"\0" * 63, b"\0" * 64, b"\0" * 65, b"x" * 10**6])
def test_damaged_signature_is_refused(data: bytes, signed: Path, key: Path) -> None:
    (signed / SIGNATURE_NAME).write_bytes(data)
    with pytest.raises(ValueError, match=r"manifest\.json\.sig"):
        open_bundle(signed, key)


def test_link_as_signature_is_refused(signed: Path, key: Path, tmp_path: Path) -> None:
    shutil.move(signed / SIGNATURE_NAME, tmp_path / "elsewhere")
    (signed / SIGNATURE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link out of the bundle"):
        open_bundle(signed, key)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no key", "not a public key"),
        (b"x" * 5000, "larger than"),
        (ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(PEM, PUBLIC), "of another kind"),
    ],
)
def test_file_that_is_no_key_is_a_bad_setting(
    data: bytes, message: str, signed: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pub").write_bytes(data)
    with pytest.raises(BadSetting, match=rf"bad\.pub: .*{message}"):
        open_bundle(signed, tmp_path / "bad.pub")


def test_run_refuses_an_unsigned_bundle_in_one_line(key: Path) -> None:
    result = CliRunner().invoke(
        main, ["--bundle", str(CLASSIFIER), "--require-signature", str(key)], input="x\n"
    )
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("ee-run: ") and result.stderr.count("\n") == 1


def test_missing_key_is_a_bad_setting(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"none\.pub: the key cannot be read"):
        open_bundle(signed, tmp_path / "none.pub")


def test_missing_package_is_named_with_its_cure(
    signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(signature, "import_module", missing)
    with pytest.raises(BadSetting, match=r"pip install 'offramp\[sign\]'"):
        open_bundle(signed, key)


def test_bundle_is_signed_where_the_current_folder_is(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = sign.write_keys(tmp_path / "ours.pem")
    monkeypatch.chdir(signed)
    done = CliRunner().invoke(sign.main, [".", "--key", str(tmp_path / "ours.pem")])
    assert done.exit_code == 0, done.output
    open_bundle(signed, public)


def test_bundle_is_signed_on_a_disk_of_its_own(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, replace = sign.write_keys(tmp_path / "ours.pem"), os.replace

    def one_disk(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", one_disk)
    before = {path.name for path in signed.iterdir()}
    sign.sign_bundle(signed, tmp_path / "ours.pem")
    open_bundle(signed, public)
    assert {path.name for path in signed.iterdir()} == before


def test_bundle_that_cannot_be_written_is_one_line(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign.write_keys(tmp_path / "ours.pem")

    def closed(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("write_bytes", "unlink"):  # of a file that is not there, too
        monkeypatch.setattr(Path, name, closed)
    with pytest.raises(BadSetting, match=r"cannot be written: .*Read-only file system"):
        sign.sign_bundle(signed, tmp_path / "ours.pem")


def test_no_secret_key_is_left_beside_the_public_key_of_another(tmp_path: Path) -> None:
    (tmp_path / "ours.pem.pub").write_bytes(b"of another")
    with pytest.raises(BadSetting, match=r"ours\.pem\.pub: the key cannot be written"):
        sign.write_keys(tmp_path / "ours.pem")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pem.pub"]
    assert (tmp_path / "ours.pem.pub").read_bytes() == b"of another"


def test_file_that_a_key_cannot_have_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(sign.main, ["--new-key", "."])
    assert done.exit_code == 2 and "the key cannot be written" in done.output, done.output
