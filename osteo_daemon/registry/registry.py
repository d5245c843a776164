"""The registry: versions of bundles, which of them is deployed, and who changed it and why.

A promotion is three steps: its row (begun), the link, its row (done). The link alone decides what is used; a process
that is killed in between leaves a begun row, and whoever uses the registry next looks at the link and settles it. So
what is deployed is always one whole version, and the history always says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osteo_daemon.audit import trail
from osteo_daemon.audit.codes import EventType, Outcome
from osteo_daemon.audit.events import Peer, security_alert
from osteo_daemon.errors import BundleError, ConfigurationError
from osteo_daemon.inference.bundle import read_bundle, shipped_bundle
from osteo_daemon.inference.signature import check_trusted, is_signed, signature_of, signature_path
from osteo_daemon.jobs.records import ModelChange, ModelChangeKind
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger
from osteo_daemon.registry.layout import Layout
from osteo_daemon.registry.version import Version, objection, version_of
from osteo_daemon.settings import Settings

_MOVES = (ModelChangeKind.PROMOTED, ModelChangeKind.ROLLED_BACK)


class Registry:
    """Versions of bundles of one node.

    Args:
        settings: of the node.
        store: where its history is kept.
    """

    def __init__(self, settings: Settings, store: JobStore) -> None:
        self._settings = settings
        self._store = store
        self._layout = Layout(settings.bundles_dir)

    def versions(self, name: str | None = None) -> list[Version]:
        """Every version, the shipped one first; each is read and its digests are checked.

        Raises:
            BundleError: one is damaged.
        """
        names = {self._settings.screener.network_bundle, self._settings.screener.localizer_bundle}
        found: list[Version] = []
        for each in [name] if name is not None else sorted({*names, *self._layout.names()}):
            shipped = shipped_bundle(each)
            folders = [*([] if shipped is None else [shipped]), *self._layout.versions(each)]
            if self._layout.is_by_hand(each):
                folders.append(self._settings.bundles_dir / each)
            found += [version_of(read_bundle(folder)) for folder in folders]
        return found

    def version(self, name: str, version: str) -> Version:
        """One version, read and verified; the registered copy before the shipped one.

        Raises:
            ConfigurationError: there is none.
            BundleError: it is damaged.
        """
        folder = self._layout.place(name, version)
        if folder in self._layout.versions(name):
            return version_of(read_bundle(folder))
        shipped = shipped_bundle(name)
        if shipped is not None and (found := version_of(read_bundle(shipped))).version == version:
            return found
        raise ConfigurationError(f"there is no version {version} of {name}; see osteo models list")

    def deployed(self, name: str) -> Version:
        """The version in use.

        Raises:
            BundleError: there is none, or it is damaged.
        """
        folder = self._layout.deployed(name) or shipped_bundle(name)
        if folder is None:
            raise BundleError(f"no bundle {name!r} is deployed")
        return version_of(read_bundle(folder))

    def shadow(self, name: str) -> Version | None:
        """The version that runs in the shadow."""
        folder = self._layout.shadow(name)
        return None if folder is None else version_of(read_bundle(folder))

    def history(self, name: str | None = None) -> list[ModelChange]:
        """Every change that was made, oldest first."""
        with self._alone():
            return [change for change in self._store.model_changes(name) if change.done]

    def register(self, folder: Path, *, who: str, reason: str, signature: Path | None = None) -> Version:
        """Copy a bundle into the registry; the same bytes again change nothing.

        Args:
            folder: of the bundle; a file of its name and ``.sig`` beside it is taken for its signature.
            who: does it.
            reason: why.
            signature: its signature's file, when it lies elsewhere.

        Raises:
            BundleError: the bundle is damaged.
            ConfigurationError: other bytes are registered under its name and version, or the folder can't be written.
        """
        bundle = version_of(read_bundle(folder))
        place = self._layout.place(bundle.name, bundle.version)
        beside = signature or signature_path(folder.resolve())
        with self._alone():
            if place in self._layout.versions(bundle.name):
                known = version_of(read_bundle(place))
                if known.sha256 != bundle.sha256:
                    raise ConfigurationError(
                        f"{bundle.name} {bundle.version} is registered with other bytes; give the new bundle a version"
                    )
                return known
            if beside.is_file():
                self._write(signature_path(place), beside.read_bytes())  # first: a version is whole when it appears
            kept = self._keep(folder, bundle)
            self._note(ModelChangeKind.REGISTERED, bundle.name, None, kept, who, reason)
        return kept

    def sign(self, name: str, version: str, key: Path) -> None:
        """Sign a registered version with a private key.

        Raises:
            ConfigurationError: there is no such version, or the key cannot be used.
        """
        found = self.version(name, version)
        if found.shipped:
            raise ConfigurationError(f"{name} {version} is the shipped one: it is used unsigned")
        with self._alone():
            self._write(signature_path(found.path), signature_of(found.path, key))

    def promote(self, name: str, version: str, *, who: str, reason: str) -> Version:
        """Deploy a version: screeners take it up before their next study. Returns the one that was deployed before.

        Raises:
            ConfigurationError: it may not be deployed (`version.objection`): there is no verdict, or one that speaks
                against it or compares it with another bundle than the deployed one; or it is deployed.
            BundleError: it is damaged, or not signed where the settings ask for it.
        """
        with self._alone():
            candidate = self.version(name, version)
            deployed = self._movable(name)
            if (why := objection(candidate, deployed)) is not None:
                raise ConfigurationError(why)
            self._check_trusted(candidate.path)
            before = self._rooted(deployed, who)
            self._move(ModelChangeKind.PROMOTED, before, candidate, who, reason)
            if self._layout.shadow(name) == candidate.path:
                self._layout.cast_shadow(name, None)
        return before

    def rollback(self, name: str, *, who: str, reason: str) -> Version:
        """Deploy the version again that was deployed before the present one; returns it.

        Raises:
            ConfigurationError: there is none before.
            BundleError: it is damaged.
        """
        with self._alone():
            present = self._movable(name)
            before = self._before(name, present)
            if before is None:
                raise ConfigurationError(f"{name} {present.version} was promoted over nothing: there is no way back")
            earlier = self.version(name, before)
            self._check_trusted(earlier.path)
            self._move(ModelChangeKind.ROLLED_BACK, present, earlier, who, reason)
        return earlier

    def cast_shadow(self, name: str, version: str | None, *, who: str, reason: str) -> Version | None:
        """Let a version run beside the deployed one without being reported; None: no more. Returns the one before.

        Raises:
            ConfigurationError: it is deployed, or no bundle of the network channel.
            BundleError: it is damaged, or not signed where the settings ask for it.
        """
        if name != self._settings.screener.network_bundle:
            raise ConfigurationError(f"{name} is not the bundle of the network channel: it has no shadow")
        with self._alone():
            before = self.shadow(name)
            candidate = None if version is None else self._registered(name, version)
            if candidate is not None:
                if candidate.sha256 == self.deployed(name).sha256:
                    raise ConfigurationError(f"{name} {version} is deployed: it needs no shadow")
                self._check_trusted(candidate.path)
            self._layout.cast_shadow(name, version)
            self._note(ModelChangeKind.SHADOWED, name, before, candidate, who, reason)
        return before

    def is_signed(self, version: Version) -> bool | None:
        """True or False where there are trusted keys; None: nobody to trust, or it came with the package."""
        keys = self._settings.models.trusted_keys
        return None if version.shipped or not keys else is_signed(version.path, keys)

    def verify(self) -> list[tuple[str, str | None]]:
        """Read every version and check digests and signatures: what it is called, and what is wrong with it."""
        found: list[tuple[str, str | None]] = []
        with self._alone():
            names = {self._settings.screener.network_bundle, self._settings.screener.localizer_bundle}
            for name in sorted({*names, *self._layout.names()}):
                shipped, registered = shipped_bundle(name), self._layout.versions(name)
                folders = [*([] if shipped is None else [shipped]), *registered]
                deployed = self._layout.deployed(name)
                if deployed is not None and deployed not in registered:
                    folders.append(deployed)
                found += [(f"{name} {folder.name}", self._fault(folder, name)) for folder in folders]
        return found

    def _fault(self, folder: Path, name: str) -> str | None:
        try:
            version = version_of(read_bundle(folder))
            self._check_trusted(folder)
        except BundleError as error:
            return error.detail
        if version.name != name:
            return f"{folder} holds the bundle {version.name}"
        if folder.parent.name == name and not version.shipped and version.version != folder.name:
            return f"{folder} holds the version {version.version}"
        return None

    def _check_trusted(self, folder: Path) -> None:
        check_trusted(read_bundle(folder), self._settings)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._layout.alone():
            self._settle()
            yield

    def _settle(self) -> None:
        """Rows that a killed process left begun: the link says whether the change was made."""
        for change in self._store.model_changes(begun=True):
            deployed = self._layout.deployed(change.name)
            place = None if change.to_version is None else self._layout.place(change.name, change.to_version)
            done = deployed is not None and place is not None and deployed == place.resolve()
            self._store.settle_model_change(change.change_id, done=done)
            get_logger().warning(
                "model_change_settled",
                kind=change.kind.value,
                bundle=change.name,
                version=change.to_version,
                outcome="made" if done else "not made",
            )

    def _movable(self, name: str) -> Version:
        if self._layout.is_by_hand(name):
            raise ConfigurationError(
                f"{self._settings.bundles_dir / name} was put there by hand; register it (osteo models register), then "
                "remove the folder"
            )
        return self.deployed(name)

    def _rooted(self, deployed: Version, who: str) -> Version:
        """The deployed version as a registered one: an update of the package must not change what a rollback gives."""
        if not deployed.shipped:
            return deployed
        place = self._layout.place(deployed.name, deployed.version)
        if place in self._layout.versions(deployed.name):
            known = version_of(read_bundle(place))
            if known.sha256 != deployed.sha256:
                raise ConfigurationError(
                    f"{deployed.name} {deployed.version} is registered with other bytes than the shipped one has"
                )
            return known
        kept = self._keep(deployed.path, deployed)
        self._note(ModelChangeKind.REGISTERED, deployed.name, None, kept, who, "the shipped bundle, for a rollback")
        return kept

    def _keep(self, folder: Path, bundle: Version) -> Version:
        try:
            kept = version_of(read_bundle(self._layout.keep(folder, bundle.name, bundle.version)))
        except OSError as error:
            raise ConfigurationError(f"{folder} could not be copied to the registry ({error.strerror})") from error
        if kept.sha256 != bundle.sha256:
            raise BundleError(f"{folder} changed while it was copied; register it again")
        return kept

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(mode=0o750, exist_ok=True)
            self._layout.write(path, content)
        except OSError as error:
            raise ConfigurationError(f"{path} could not be written ({error.strerror})") from error

    def _registered(self, name: str, version: str) -> Version:
        found = self.version(name, version)
        if found.shipped:
            raise ConfigurationError(f"{name} {version} is not registered; see osteo models register")
        return found

    def _move(self, kind: ModelChangeKind, before: Version, after: Version, who: str, reason: str) -> None:
        change = self._store.begin_model_change(
            kind,
            after.name,
            (before.version, before.sha256),
            (after.version, after.sha256),
            who=who,
            reason=reason,
        )
        try:
            self._layout.deploy(after.name, after.version)
        except OSError as error:
            self._settle()
            raise ConfigurationError(f"{after.name} could not be deployed ({error.strerror})") from error
        self._store.settle_model_change(change, done=True)
        _tell(kind, after.name, after, who, reason)

    def _note(
        self,
        kind: ModelChangeKind,
        name: str,
        before: Version | None,
        after: Version | None,
        who: str,
        reason: str,
    ) -> None:
        pairs = [None if entry is None else (entry.version, entry.sha256) for entry in (before, after)]
        self._store.begin_model_change(kind, name, pairs[0], pairs[1], who=who, reason=reason, done=True)
        _tell(kind, name, after, who, reason)

    def _before(self, name: str, present: Version) -> str | None:
        """The version below the present one in the pile of promotions; a rollback takes the topmost away."""
        pile: list[tuple[str | None, str | None]] = []
        for change in self._store.model_changes(name):
            if not change.done or change.kind not in _MOVES:
                continue
            if change.kind is ModelChangeKind.PROMOTED:
                pile.append((change.from_version, change.to_sha256))
            elif pile:
                pile.pop()
        return pile[-1][0] if pile and pile[-1][1] == present.sha256 else None


def _tell(kind: ModelChangeKind, name: str, after: Version | None, who: str, reason: str) -> None:
    version = "none" if after is None else after.version
    get_logger().info("model_changed", kind=kind.value, bundle=name, version=version, reason=reason)
    text = f"bundle {name}: {version} {kind.value.replace('_', ' ')}; {reason}"
    trail.record(security_alert(EventType.SOFTWARE_CONFIGURATION, text, performing=Peer(who), outcome=Outcome.SUCCESS))
