"""Who may log in to the console: names, roles and argon2id hashes in one file that only the node's user can read.

A file and not a table: hashes stay out of backups and out of a database that several nodes share, and people can be
locked out while the job store is down (docs/decisions/0011-console.md).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import Settings

SCHEMA: Final = "osteo-users/1"
SHORTEST_PASSWORD: Final = 12
LONGEST_PASSWORD: Final = 256
"""Nobody types more, and hashing must have a bound."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_AT_ONCE = 2  # each hash takes 64 MiB and a processor


class Role(StrEnum):
    """What a person may do; each role may do what the one before may."""

    VIEWER = "viewer"  # look
    OPERATOR = "operator"  # act on studies and deliveries, ask peers whether they are there
    ADMINISTRATOR = "administrator"  # change models and labels, read the audit log

    def may(self, needed: Role) -> bool:
        """Whether this role may do what ``needed`` may."""
        ranks = list(Role)
        return ranks.index(self) >= ranks.index(needed)


@dataclass(frozen=True, slots=True)
class User:
    """One person.

    Attributes:
        name: logged in with, and named in histories and audit messages.
        role: what they may do.
        hash: of the password, with its parameters.
        changed_at: when password or role were set last: older sessions end.
    """

    name: str
    role: Role
    hash: str
    changed_at: str


class UserFile:
    """The users of one node; every process and thread may use it at once.

    Args:
        path: of the file; its folder is made at the first change.
        hasher: makes the hashes of new passwords; those that are there carry their own parameters.
    """

    def __init__(self, path: Path, hasher: PasswordHasher | None = None) -> None:
        self._path = path
        self._hasher = hasher or PasswordHasher()
        self._places = threading.BoundedSemaphore(_AT_ONCE)

    @cached_property
    def _nobody(self) -> str:
        # an unknown name takes as long as a wrong password: names can't be told by the clock
        return self._hasher.hash(os.urandom(16).hex())

    def users(self) -> dict[str, User]:
        """All users by name.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        try:
            document = json.loads(self._path.read_bytes())
            if document["schema"] != SCHEMA:
                raise ConfigurationError(f"{self._path} is not of the schema {SCHEMA}")
            found = [User(**{**entry, "role": Role(entry["role"])}) for entry in document["users"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{self._path} cannot be read: {type(error).__name__}") from None
        return {user.name: user for user in found}

    def add(self, name: str, role: Role, password: str) -> None:
        """Let a person in.

        Raises:
            ConfigurationError: the name is taken or no name, the password too short or too long, or the file fails.
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is no user name: up to 32 of a-z, 0-9, dot, hyphen and underscore, a letter or digit first"
            )
        user = User(name, role, self._hash(name, password), _now())
        with self._changing() as users:
            if name in users:
                raise ConfigurationError(f"there is a user {name} already; see osteo users password")
            users[name] = user

    def remove(self, name: str) -> None:
        """Let a person in no longer; open sessions end with their next request.

        Raises:
            ConfigurationError: there is none of this name.
        """
        with self._changing() as users:
            _known(users, name)
            del users[name]

    def set_password(self, name: str, password: str) -> None:
        """Change a password; open sessions end.

        Raises:
            ConfigurationError: as `add`, or there is none of this name.
        """
        hashed = self._hash(name, password)
        with self._changing() as users:
            users[name] = replace(_known(users, name), hash=hashed, changed_at=_now())

    def set_role(self, name: str, role: Role) -> None:
        """Change what a person may do; open sessions end.

        Raises:
            ConfigurationError: there is none of this name.
        """
        with self._changing() as users:
            users[name] = replace(_known(users, name), role=role, changed_at=_now())

    def verify(self, name: str, password: str) -> User | None:
        """The user of a name and a password, or None. It takes as long for names that don't exist.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        user = self.users().get(name)
        with self._places:
            try:
                self._hasher.verify(self._nobody if user is None else user.hash, password[:LONGEST_PASSWORD])
            except (VerificationError, InvalidHashError):
                return None
        return user

    def _hash(self, name: str, password: str) -> str:
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise ConfigurationError(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
        if password.lower().startswith(name) and len(password) - len(name) < SHORTEST_PASSWORD // 2:
            raise ConfigurationError("the password is little more than the name")
        if len(set(password)) < SHORTEST_PASSWORD // 2:
            raise ConfigurationError(f"a password has {SHORTEST_PASSWORD // 2} different characters or more")
        return self._hasher.hash(password)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, User]]:
        """All users, written back when the block ends; nobody else changes them meanwhile."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._path.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                users = self.users()
                yield users
                _replace(self._path, users)
        except OSError as error:
            raise ConfigurationError(f"{self._path} cannot be written ({error.strerror})") from error


def users_path(settings: Settings) -> Path:
    """Where a node's users are kept."""
    return settings.state_dir / "console" / "users.json"


def users_file(settings: Settings) -> UserFile:
    """The users of a node."""
    return UserFile(users_path(settings))


def _known(users: Mapping[str, User], name: str) -> User:
    if name not in users:
        raise ConfigurationError(f"there is no user {name}; see osteo users list")
    return users[name]


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _replace(path: Path, users: Mapping[str, User]) -> None:
    document = {"schema": SCHEMA, "users": [asdict(users[name]) for name in sorted(users)]}
    # made with mode 0600
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as part:
        json.dump(document, part, indent=1)
        part.flush()
        os.fsync(part.fileno())
    Path(part.name).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
