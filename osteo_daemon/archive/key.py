"""The key of the identity link: one file outside the archive, without which nobody can tell who a pseudonym is.

From its 32 random bytes come two keys (HKDF-SHA256, RFC 5869): one seals links (AES-256-GCM, NIST SP 800-38D; the
pseudonym is the associated data, so that a link can't be moved to another row), one makes keyed digests, by which
studies of one patient find each other without being read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from osteo_daemon.errors import ConfigurationError, Damaged
from osteo_daemon.jobs.spool import sync_folder

_SECRET_BYTES = 32
_NONCE_BYTES = 12


class LinkKey:
    """Seals and opens links, and makes keyed digests."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(_derived(secret, b"osteo-archive/seal"))
        self._digest_key = _derived(secret, b"osteo-archive/digest")

    @property
    def fingerprint(self) -> str:
        """Tells keys apart and nothing of them."""
        return self.digest("fingerprint")[:32]

    def digest(self, *parts: str) -> str:
        """HMAC-SHA256 in hexadecimal over the parts and their lengths."""
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hmac.new(self._digest_key, text.encode(), hashlib.sha256).hexdigest()

    def seal(self, pseudonym: str, values: Mapping[str, str]) -> bytes:
        """Encrypt for one pseudonym."""
        nonce = os.urandom(_NONCE_BYTES)
        text = json.dumps(values, sort_keys=True).encode()
        return nonce + self._cipher.encrypt(nonce, text, pseudonym.encode())

    def open(self, pseudonym: str, sealed: bytes) -> dict[str, str]:
        """What was sealed for this pseudonym.

        Raises:
            Damaged: another key sealed it, or it was changed or moved.
        """
        try:
            text = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], pseudonym.encode())
        except (InvalidTag, ValueError) as error:
            raise Damaged("a link of the archive does not open with this key") from error
        values: dict[str, str] = json.loads(text)
        return values


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose study it is: what is sealed, and by which studies of one patient are told."""

    patient_id: str
    issuer: str
    birth_date: str
    study_instance_uid: str
    accession: str
    study_date: str

    def patient_key(self, key: LinkKey) -> str:
        """Digest of the patient; of the study alone where ID or birth date is missing: no link is better than a wrong
        one."""
        if not self.patient_id or not self.birth_date:
            return key.digest("study", self.study_instance_uid)
        return key.digest("patient", self.issuer, self.patient_id, self.birth_date)

    def study_key(self, key: LinkKey) -> str:
        """Digest of the study."""
        return key.digest("entry", self.study_instance_uid)

    @property
    def patient(self) -> dict[str, str]:
        """What is sealed under the patient's pseudonym."""
        about = {"patient_id": self.patient_id, "issuer": self.issuer, "birth_date": self.birth_date}
        # without them the digest is the study's, and must be found again when keys change
        return (
            about if self.patient_id and self.birth_date else {**about, "study_instance_uid": self.study_instance_uid}
        )

    @property
    def study(self) -> dict[str, str]:
        """What is sealed under the study's pseudonym."""
        return {
            "study_instance_uid": self.study_instance_uid,
            "accession": self.accession,
            "study_date": self.study_date,
        }

    @classmethod
    def of(cls, patient: Mapping[str, str], study: Mapping[str, str]) -> Identity:
        """From what was sealed."""
        return cls(
            patient.get("patient_id", ""),
            patient.get("issuer", ""),
            patient.get("birth_date", ""),
            study.get("study_instance_uid", patient.get("study_instance_uid", "")),
            study.get("accession", ""),
            study.get("study_date", ""),
        )


def make_key(path: Path) -> LinkKey:
    """Write a new key for its owner alone, whole or not at all, never over another.

    Raises:
        ConfigurationError: the file exists or cannot be written.
    """
    secret = os.urandom(_SECRET_BYTES)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, secret)
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(part, path)
        finally:
            part.unlink()
        sync_folder(path.parent)
    except FileExistsError as error:
        raise ConfigurationError(f"{path} exists; a key is never written over") from error
    except OSError as error:
        raise ConfigurationError(f"the key {path} could not be written ({error.strerror})") from error
    return LinkKey(secret)


def read_key(path: Path) -> LinkKey:
    """Read the key.

    Raises:
        ConfigurationError: it is not there, others may read it, or it is none of ours.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(_SECRET_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigurationError(f"the archive's key {path} is not there; make one: osteo archive init") from error
    except OSError as error:
        raise ConfigurationError(f"the archive's key {path} cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise ConfigurationError(f"others may read the archive's key {path} (mode {mode:o}); chmod 600 it")
    if len(secret) != _SECRET_BYTES:
        raise ConfigurationError(f"{path} is no key of the archive; osteo archive init makes one")
    return LinkKey(secret)


def new_key_path(path: Path) -> Path:
    """Where the next key lies while keys are exchanged."""
    return path.with_name(path.name + ".new")


def take_over_new_key(path: Path) -> None:
    """The next key becomes the key."""
    new_key_path(path).replace(path)
    sync_folder(path.parent)


def key_that_fits(path: Path, fingerprint: str | None) -> LinkKey:
    """The key; when an exchange of keys was interrupted after the store had changed, the next one.

    Args:
        path: of the key.
        fingerprint: of the key that sealed what the store holds, None before the first.

    Raises:
        ConfigurationError: it is not there, others may read it, or it is none of ours.
    """
    following = new_key_path(path)
    if fingerprint is not None and following.exists():
        key = read_key(following)
        if key.fingerprint == fingerprint:
            take_over_new_key(path)
            return key
    return read_key(path)


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=purpose).derive(secret)
