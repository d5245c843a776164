"""Signatures of bundles: Ed25519 (RFC 8032) over the manifest, which holds the digest of every file.

The signature of the folder ``X`` is the file ``X.sig`` beside it, 64 raw bytes: a bundle's own folder holds nothing
that its manifest doesn't name. ``openssl pkeyutl -sign -rawin`` over ``MANIFEST.sha256`` makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from osteo_daemon.errors import BundleError, ConfigurationError
from osteo_daemon.inference.bundle import (
    MANIFEST_NAME,
    ModelBundle,
    bundle_digest,
    find_bundle,
    is_shipped,
    shipped_bundle,
)
from osteo_daemon.settings import Settings

SUFFIX: Final = ".sig"


def find_signed_bundle(name: str, settings: Settings) -> ModelBundle:
    """As `bundle.find_bundle`; a site's own bundle must be signed where the settings ask for it.

    Raises:
        BundleError: there is none, it is damaged, or no trusted key has signed it.
        ConfigurationError: a key cannot be read.
    """
    bundle = find_bundle(name, settings.bundles_dir)
    check_trusted(bundle, settings)
    return bundle


def check_trusted(bundle: ModelBundle, settings: Settings) -> None:
    """Refuse a bundle that isn't signed where the settings ask for it; what came with the package needs none.

    Raises:
        BundleError: no trusted key has signed it.
        ConfigurationError: a key cannot be read.
    """
    if not settings.models.require_signature or is_shipped(bundle.path):
        return
    if shipped_bundle(bundle.name) is not None and bundle_digest(bundle.name) == bundle.sha256:
        return  # a copy, byte by byte
    check_signature(bundle.path, settings.models.trusted_keys)


def check_signature(folder: Path, trusted_keys: Sequence[Path]) -> None:
    """Refuse a bundle that no trusted key has signed.

    Raises:
        BundleError: the signature is missing or of none of the keys.
        ConfigurationError: a key cannot be read.
    """
    path = signature_path(folder)
    try:
        signature, manifest = path.read_bytes(), (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); sign the bundle: osteo models sign") from error
    for key in trusted_keys:
        try:
            public_key(key).verify(signature, manifest)
        except InvalidSignature:
            continue
        return
    raise BundleError(f"{path} is no signature of this bundle by a key of models.trusted_keys")


def is_signed(folder: Path, trusted_keys: Sequence[Path]) -> bool:
    """True when a trusted key has signed it.

    Raises:
        ConfigurationError: a key cannot be read.
    """
    try:
        check_signature(folder, trusted_keys)
    except BundleError:
        return False
    return True


def signature_of(folder: Path, key: Path) -> bytes:
    """Sign a bundle's manifest with a private key in PEM.

    Raises:
        ConfigurationError: the key cannot be used.
        BundleError: there is no manifest.
    """
    try:
        loaded = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"{key} is no private key in PEM without a password") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigurationError(f"{key} is no Ed25519 key; make one: openssl genpkey -algorithm ed25519")
    try:
        return loaded.sign((folder / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise BundleError(f"{folder / MANIFEST_NAME} cannot be read ({error.strerror})") from error


def public_key(path: Path) -> Ed25519PublicKey:
    """A trusted key in PEM.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        loaded = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"models.trusted_keys: {path} is no public key in PEM") from error
    if not isinstance(loaded, Ed25519PublicKey):
        raise ConfigurationError(f"models.trusted_keys: {path} is no Ed25519 key")
    return loaded


def signature_path(folder: Path) -> Path:
    """Where the signature of the bundle in a folder lies."""
    return folder.with_name(folder.name + SUFFIX)
