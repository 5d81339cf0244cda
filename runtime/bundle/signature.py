"""The signature of a bundle: Ed25519 over its manifest's bytes, which hold the sha256 of all other files.

It is the file manifest.json.sig, 64 bytes. Keys are PEM files as OpenSSL writes them, so that OpenSSL can
sign and verify as well: `openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in manifest.json -sigfile
manifest.json.sig`. Ed25519: RFC 8032. ee-sign (export.sign) makes keys and signatures.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
from offramp.runtime.errors import BadSetting, BadSignature

SIGNATURE_BYTES = 64
LONGEST_KEY = 4096  # bytes of a PEM file


def check_signature(
    folder: Path, manifest: bytes, signature: bytes | None, key: str | os.PathLike[str]
) -> None:
    """Verify that a public key signed a manifest; raises BadSignature if not.

    folder: the bundle, for messages. signature: None if there is none. key: file of the public key, PEM.
    Raises BadSetting if the key cannot be read or the package cryptography is missing.
    """
    public = read_public_key(Path(key))
    if signature is None:
        raise BadSignature(
            f"{folder}: not signed, it has no {SIGNATURE_NAME}; a signature by {key} is required: sign it "
            "with ee-sign if it is yours"
        )
    try:
        public.verify(signature, manifest)
    except import_cryptography("exceptions").InvalidSignature:
        raise BadSignature(
            f"{folder / SIGNATURE_NAME}: not a signature of this {FILE_NAME} by {key}: another key signed "
            "it, or it was changed afterwards; do not use it, or sign it again with ee-sign if it is yours"
        ) from None


def read_public_key(path: Path) -> Any:
    """Read an Ed25519 public key from a PEM file; raises BadSetting, which names the file and the cure."""
    data = read_key_file(path)
    try:
        key = import_cryptography("hazmat.primitives.serialization").load_pem_public_key(data)
    except (ValueError, import_cryptography("exceptions").UnsupportedAlgorithm) as problem:
        raise BadSetting(
            f"{path}: not a public key in a PEM file ({problem}); make one with ee-sign --new-key"
        ) from None
    if not isinstance(key, import_cryptography("hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey):
        raise BadSetting(f"{path}: a key of another kind; signatures are made with Ed25519")
    return key


def read_key_file(path: Path) -> bytes:
    """Read the bytes of a key's file; raises BadSetting."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_KEY + 1)
    except OSError as problem:
        raise BadSetting(f"{path}: the key cannot be read: {problem}") from None
    if len(data) > LONGEST_KEY:
        raise BadSetting(f"{path}: larger than {LONGEST_KEY} bytes, so it is no key")
    return data


def import_cryptography(module: str) -> Any:
    """Import a module of the package cryptography; raises BadSetting with the cure if it is missing."""
    try:
        return import_module(f"cryptography.{module}")
    except ImportError as problem:
        raise BadSetting(
            f"signatures need the package cryptography ({problem}); pip install 'offramp[sign]'"
        ) from problem
