"""Command ee-sign: keys that only the user can read, and signatures of bundles that verify."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from tiny_bundles import CLASSIFIER

from offramp.export import sign, trt_compile
from offramp.export.bundle import check_target
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import SIGNATURE_NAME
from offramp.runtime.errors import BadSetting


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    sign.write_keys(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(sign.main, [str(argument) for argument in arguments])


def test_new_key_signs_and_its_public_key_verifies(tmp_path: Path, folder: Path) -> None:
    assert run("--new-key", tmp_path / "ours.pem").exit_code == 0
    result = run(folder, "--key", tmp_path / "ours.pem")
    assert result.exit_code == 0, result.output
    open_bundle(folder, tmp_path / "ours.pem.pub").verify()


def test_secret_key_is_for_the_user_alone(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_existing_key_is_kept(key: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(BadSetting, match=r"key\.pem: the key cannot be written"):
        sign.write_keys(key)
    assert key.read_bytes() == before


def test_encrypted_key_asks_for_its_password(tmp_path: Path, folder: Path, key: Path) -> None:
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"word")
    key.write_bytes(
        secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    arguments = [str(folder), "--key", str(key)]
    assert CliRunner().invoke(sign.main, arguments, input="wrong\n").exit_code == 2
    assert CliRunner().invoke(sign.main, arguments, input="word\n").exit_code == 0
    open_bundle(folder, tmp_path / "key.pem.pub")


def test_damaged_bundle_is_not_signed(folder: Path, key: Path) -> None:
    shutil.copy(folder / "segment_01.onnx", folder / "segment_00.onnx")
    result = run(folder, "--key", key)
    assert result.exit_code == 2 and "segment_00.onnx" in result.output
    assert not (folder / SIGNATURE_NAME).exists()


def test_public_key_cannot_sign(folder: Path, key: Path) -> None:
    result = run(folder, "--key", f"{key}.pub")
    assert result.exit_code == 2 and "not a secret key" in result.output


@pytest.mark.parametrize("arguments", [(), ("bundle",), ("--key", "k"), ("bundle", "--new-key", "k")])
def test_incomplete_options_are_refused(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_verify_names_the_key(folder: Path, key: Path) -> None:
    sign.sign_bundle(folder, key)
    result = CliRunner().invoke(trt_compile.main, [str(folder), "--key", f"{key}.pub"])
    assert result.exit_code == 0 and "signed by" in result.output


def test_verify_refuses_an_unsigned_bundle(folder: Path, key: Path) -> None:
    result = CliRunner().invoke(trt_compile.main, [str(folder), "--key", f"{key}.pub"])
    assert result.exit_code == 2 and "not signed" in result.output


def test_signed_bundle_may_be_replaced(folder: Path, key: Path) -> None:
    sign.sign_bundle(folder, key)
    check_target(folder, overwrite=True)
