"""ee-sign: sign a bundle, so that who opens it can require that it is yours.

\b
    ee-sign --new-key ours.pem                          # once: writes ours.pem, secret, and ours.pem.pub
    ee-sign bundle/ --key ours.pem                      # writes bundle/manifest.json.sig
    ee-run --bundle bundle/ --require-signature ours.pem.pub
    ee-verify bundle/ --key ours.pem.pub

The signature covers the manifest, and the manifest the sha256 of every file. What changes the manifest, as
ee-calibrate does, makes it invalid: sign last. Before it signs, ee-sign checks the bundle as ee-verify does.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
from offramp.runtime.bundle.signature import import_cryptography, read_key_file
from offramp.runtime.errors import BadBundle, BadSetting, OfframpError
from offramp.runtime.hub.resolve import require_folder

PUBLIC = ".pub"  # end of the name of a public key's file


def write_keys(path: Path) -> Path:
    """Write a new secret key to a file that only the user can read, and its public key beside it.

    Returns the path of the public key. Raises BadSetting if one of the files exists or cannot be written.
    """
    serialization = import_cryptography("hazmat.primitives.serialization")
    secret = import_cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()
    public = Path(f"{path}{PUBLIC}")
    pem = serialization.Encoding.PEM
    secret_text = secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_text = secret.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    written: list[Path] = []
    for file, text, mode in ((path, secret_text, 0o600), (public, public_text, 0o644)):
        try:  # O_EXCL: a key is never replaced; what it signed could not be signed again
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(file)
            with open(handle, "wb") as stream:
                stream.write(text)
        except OSError as problem:
            for half in written:  # a secret key beside the public key of another would sign in vain
                half.unlink(missing_ok=True)
            raise BadSetting(f"{file}: the key cannot be written: {problem}") from None
    return public


def read_secret_key(path: Path) -> Any:
    """Read an Ed25519 secret key from a PEM file, and ask for its password if it has one.

    Raises BadSetting, which names the file.
    """
    serialization = import_cryptography("hazmat.primitives.serialization")
    data, password = read_key_file(path), None
    if b"ENCRYPTED" in data:
        password = click.prompt(f"password of {path}", hide_input=True, err=True).encode()
    try:
        key = serialization.load_pem_private_key(data, password)
    except (ValueError, TypeError, import_cryptography("exceptions").UnsupportedAlgorithm) as problem:
        raise BadSetting(f"{path}: not a secret key in a PEM file ({problem})") from None
    if not isinstance(key, import_cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey):
        raise BadSetting(f"{path}: a key of another kind; signatures are made with Ed25519")
    return key


def sign_bundle(folder: Path, key: Path) -> None:
    """Verify all files of a bundle, then sign its manifest with a secret key.

    The signature appears complete or not at all. Raises BadBundle, BundleNotFound, BadSetting.
    """
    secret = read_secret_key(key)
    open_bundle(folder)  # first: a manifest may be a device, or have no end
    data = (folder / FILE_NAME).read_bytes()
    open_bundle(folder).verify()
    if (folder / FILE_NAME).read_bytes() != data:
        raise BadBundle(f"{folder / FILE_NAME}: it changed while it was read; sign it again")
    # In the folder: what is beside it may be another disk, or closed to the user, as with a mounted folder.
    new = folder / f".{SIGNATURE_NAME}.new"
    try:
        new.write_bytes(secret.sign(data))
        os.replace(new, folder / SIGNATURE_NAME)
    except OSError as problem:
        with suppress(OSError):
            new.unlink()
        raise BadSetting(f"{folder / SIGNATURE_NAME}: cannot be written: {problem}") from None


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="Secret key that signs BUNDLE.")
@click.option(
    "--new-key", type=click.Path(path_type=Path), metavar="FILE", help="Write a new key, and FILE.pub."
)
def main(bundle: Path | None, key: Path | None, new_key: Path | None) -> None:
    """Command ee-sign: make a key, or sign a bundle."""
    if (new_key is None) == (bundle is None) or (bundle is None) != (key is None):
        raise click.UsageError("give BUNDLE and --key FILE to sign, or --new-key FILE to make a key")
    try:
        if new_key is not None:
            click.echo(f"{new_key}: secret, keep it; {write_keys(new_key)}: public, give it to your users")
        elif bundle is not None and key is not None:
            sign_bundle(require_folder(bundle, "ee-sign"), key)
            click.echo(f"{bundle}: signed with {key}")
    except OfframpError as problem:
        click.echo(f"ee-sign: {problem}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
