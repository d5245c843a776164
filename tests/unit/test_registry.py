"""The registry of bundles: what may be deployed, what is never half deployed, and what a rollback gives."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from osteo_daemon.audit import trail
from osteo_daemon.cli import cli
from osteo_daemon.errors import BundleError, ConfigurationError
from osteo_daemon.inference.bundle import ModelBundle, bundle_digest, find_bundle, read_bundle
from osteo_daemon.inference.signature import find_signed_bundle
from osteo_daemon.jobs.records import Shadow
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.registry.paired import compare_shadow
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import AuditSettings, ModelsSettings, Settings
from tests.candidates import NETWORK, tiny_candidate
from tests.stores import new_sqlite

WHO = {"who": "a person", "reason": "a test"}


@dataclasses.dataclass
class Node:
    """A registry with its store and settings."""

    settings: Settings
    store: JobStore
    registry: Registry
    folder: Path

    def deployed(self) -> ModelBundle:
        """What a screener would load."""
        return find_signed_bundle(NETWORK, self.settings)

    def add(self, version: str, verdict: str | None = "better", parent: ModelBundle | None = None) -> ModelBundle:
        """Register a candidate that follows from the deployed bundle, or another."""
        made = tiny_candidate(self.folder / version, version, verdict, parent or self.deployed())
        return read_bundle(self.registry.register(made.path, **WHO).path)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return a_node(tmp_path)


def a_node(folder: Path, **settings: Any) -> Node:
    store = new_sqlite(folder / "state")
    values = Settings(state_dir=folder / "state", **settings)
    return Node(values, store, Registry(values, store), folder)


def test_a_candidate_is_registered_promoted_and_rolled_back(node: Node) -> None:
    shipped = find_bundle(NETWORK)
    candidate = node.add("1.0.0+here")
    assert node.deployed().sha256 == shipped.sha256  # registering deploys nothing
    (version,) = [entry for entry in node.registry.versions(NETWORK) if not entry.shipped]
    assert (version.verdict, version.compared_with) == ("better", shipped.sha256)
    assert (version.data_sha256, version.code_version) == ("d" * 64, "0.1.0")

    before = node.registry.promote(NETWORK, "1.0.0+here", **WHO)
    assert before.sha256 == shipped.sha256
    assert node.deployed().sha256 == candidate.sha256 == bundle_digest(NETWORK, node.settings.bundles_dir)
    second = node.add("1.1.0+here", "equal")
    node.registry.promote(NETWORK, "1.1.0+here", **WHO)
    assert node.deployed().sha256 == second.sha256
    assert node.registry.rollback(NETWORK, **WHO).version == "1.0.0+here"
    assert node.deployed().sha256 == candidate.sha256
    # once more promoted, back, and back again to where all began
    node.registry.promote(NETWORK, "1.1.0+here", **WHO)
    node.registry.rollback(NETWORK, **WHO)
    assert node.registry.rollback(NETWORK, **WHO).sha256 == shipped.sha256
    assert node.deployed().sha256 == shipped.sha256
    assert node.deployed().path.is_relative_to(node.settings.bundles_dir)  # a copy: an update cannot change it
    with pytest.raises(ConfigurationError, match="no way back"):
        node.registry.rollback(NETWORK, **WHO)
    moves = [
        (change.kind.value, change.to_version) for change in node.registry.history() if change.kind != "registered"
    ]
    assert moves == [
        ("promoted", "1.0.0+here"),
        ("promoted", "1.1.0+here"),
        ("rolled_back", "1.0.0+here"),
        ("promoted", "1.1.0+here"),
        ("rolled_back", "1.0.0+here"),
        ("rolled_back", shipped.version),
    ]
    assert {(change.who, change.reason) for change in node.registry.history() if change.kind != "registered"} == {
        ("a person", "a test")
    }
    assert all(fault is None for _, fault in node.registry.verify())


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (None, "no verdict: nothing is promoted without one"),
        ("worse", "is worse: it is not promoted"),
        ("not_enough_data", "is not_enough_data: it is not promoted"),
    ],
)
def test_what_no_verdict_speaks_for_is_not_promoted(node: Node, verdict: str | None, why: str) -> None:
    node.add("1.0.0", verdict)
    with pytest.raises(ConfigurationError, match=why):
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    assert node.deployed().sha256 == find_bundle(NETWORK).sha256
    assert not [change for change in node.store.model_changes() if change.kind == "promoted"]


def test_a_verdict_against_another_bundle_counts_for_nothing(node: Node) -> None:
    shipped = node.deployed()
    node.add("1.0.0")
    node.add("2.0.0")
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    with pytest.raises(ConfigurationError, match=r"1\.0\.0 .* is deployed: refit against that, or roll back"):
        node.registry.promote(NETWORK, "2.0.0", **WHO)
    with pytest.raises(ConfigurationError, match="deployed already"):
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    with pytest.raises(ConfigurationError, match="no verdict"):
        node.registry.promote(NETWORK, shipped.version, **WHO)  # its copy: the way back is a rollback
    node.registry.rollback(NETWORK, **WHO)
    node.registry.promote(NETWORK, "2.0.0", **WHO)
    with pytest.raises(ConfigurationError, match="there is no version"):
        node.registry.promote(NETWORK, "9.9.9", **WHO)


@pytest.mark.parametrize(
    "document", [b"{", b'{"schema": "other/1"}', b'{"schema": "osteo-verdict/1", "verdict": "best"}']
)
def test_a_verdict_that_cannot_be_read_is_no_verdict(node: Node, document: bytes) -> None:
    folder = node.folder / "odd"
    tiny_candidate(folder, "1.0.0")
    (folder / "docs" / "verdict.json").write_bytes(document)
    manifest = folder / "MANIFEST.sha256"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != manifest)
    manifest.write_bytes(subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, check=True).stdout)
    with pytest.raises(BundleError, match=r"verdict\.json"):
        node.registry.register(folder, **WHO)


def test_versions_never_change(node: Node) -> None:
    first = node.add("1.0.0")
    again = node.registry.register(node.folder / "1.0.0", **WHO)
    assert again.sha256 == first.sha256
    assert len([change for change in node.registry.history() if change.kind == "registered"]) == 1
    other = tiny_candidate(node.folder / "other", "1.0.0", salt=1.0)
    with pytest.raises(ConfigurationError, match="registered with other bytes"):
        node.registry.register(other.path, **WHO)
    for version in ("../up", "a/b", ".hidden", "x.sig"):
        tiny_candidate(node.folder / "strange", version)
        with pytest.raises(ConfigurationError, match="cannot be a version"):
            node.registry.register(node.folder / "strange", **WHO)
    weights = first.path / "models" / "model.safetensors"
    assert weights.stat().st_mode & 0o222 == 0
    weights.chmod(0o640)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    faults = {title: fault for title, fault in node.registry.verify() if fault}
    assert list(faults) == [f"{NETWORK} 1.0.0"]
    with pytest.raises(BundleError, match="differs from its digest"):
        node.registry.promote(NETWORK, "1.0.0", **WHO)


def test_a_folder_put_there_by_hand_is_not_overwritten(node: Node) -> None:
    node.add("1.0.0")
    by_hand = tiny_candidate(node.settings.bundles_dir / NETWORK, "0.0.1", None)
    assert node.deployed().sha256 == by_hand.sha256
    with pytest.raises(ConfigurationError, match="put there by hand"):
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    assert f"{NETWORK} {NETWORK}" in dict(node.registry.verify())


def keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key in PEM."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / "signing.pem", folder / "trusted.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_only_signed_bundles_where_the_site_asks_for_it(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    (tmp_path / "stranger").mkdir()
    stranger, _ = keys(tmp_path / "stranger")
    node = a_node(tmp_path, models=ModelsSettings(require_signature=True, trusted_keys=(public,)))
    assert node.deployed().version  # what came with the package needs none
    node.add("1.0.0")
    with pytest.raises(BundleError, match="sign the bundle"):
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    node.registry.sign(NETWORK, "1.0.0", stranger)
    with pytest.raises(BundleError, match="is no signature of this bundle"):
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    with pytest.raises(BundleError, match="is no signature of this bundle"):
        node.registry.cast_shadow(NETWORK, "1.0.0", **WHO)
    assert dict(node.registry.verify())[f"{NETWORK} 1.0.0"] is not None
    node.registry.sign(NETWORK, "1.0.0", private)
    assert dict(node.registry.verify())[f"{NETWORK} 1.0.0"] is None
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    assert node.deployed().version == "1.0.0"
    node.registry.rollback(NETWORK, **WHO)  # the copy of the shipped bundle
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    # a signature that goes, or a key that is no longer trusted: the screener does not load it
    unsigned = node.deployed().path.with_name("1.0.0.sig")
    kept = unsigned.read_bytes()
    unsigned.unlink()
    with pytest.raises(BundleError, match="sign the bundle"):
        node.deployed()
    unsigned.write_bytes(kept)
    # OpenSSL makes and checks the same signature
    manifest = node.deployed().path / "MANIFEST.sha256"
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(public), "-in", str(manifest)]
    checked = subprocess.run([*command, "-sigfile", str(unsigned)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with pytest.raises(ConfigurationError, match="is no private key"):
        node.registry.sign(NETWORK, "1.0.0", public)


def test_a_signature_beside_the_bundle_comes_along(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    node = a_node(tmp_path, models=ModelsSettings(require_signature=True, trusted_keys=(public,)))
    made = tiny_candidate(tmp_path / "candidate", "1.0.0")
    manifest = made.path / "MANIFEST.sha256"
    command = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(private), "-in", str(manifest)]
    subprocess.run([*command, "-out", str(tmp_path / "candidate.sig")], check=True)
    kept = node.registry.register(made.path, **WHO)
    assert node.registry.is_signed(kept)
    node.registry.promote(NETWORK, "1.0.0", **WHO)


def test_the_audit_trail_tells_who_promoted_what(tmp_path: Path) -> None:
    node = a_node(tmp_path, audit=AuditSettings(enabled=True))
    trail.open_trail(node.settings, "test")
    try:
        node.add("1.0.0")
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    finally:
        trail.open_trail(Settings(state_dir=tmp_path / "state"), "test")
    told = "".join(
        path.read_text(errors="replace") for path in (tmp_path / "state" / "audit").rglob("*") if path.is_file()
    )
    assert told.count("110131") == 3  # registered, the shipped one registered, promoted
    assert "a person" in told
    assert base64.b64encode(b"bundle osteo-moe: 1.0.0 promoted; a test").decode() in told


# --- killed in the middle ---------------------------------------------------------------------------------------------

_CALLS = {"mkdir", "rename", "replace", "symlink", "unlink", "fsync", "chmod", "flock", "execute", "commit"}
"""What changes files or the store."""


def killed_at(number: int, settings: Settings, act: Callable[[Registry], object]) -> bool:
    """Do it in a child that gets SIGKILL before its n-th call that changes something; True when it was killed."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def before_call(_frame: FrameType, event: str, called: Any) -> None:
            nonlocal count
            owner = type(getattr(called, "__self__", "")).__name__
            if event == "c_call" and called.__name__ in _CALLS and owner in ("module", "Cursor", "Connection"):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            registry = Registry(settings, JobStore(settings.database_url))
            sys.setprofile(before_call)
            act(registry)
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_killed_at_any_moment_one_whole_version_is_deployed_and_the_history_says_which(
    tmp_path: Path, act: str
) -> None:
    node = a_node(tmp_path)
    first, second = node.add("1.0.0"), None
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    second = node.add("2.0.0")
    if act == "rollback":
        node.registry.promote(NETWORK, "2.0.0", **WHO)
    before, after = (first, second) if act == "promote" else (second, first)
    url = node.settings.database_url
    node.store.close()

    def change(registry: Registry) -> None:
        if act == "promote":
            registry.promote(NETWORK, "2.0.0", **WHO)
        else:
            registry.rollback(NETWORK, **WHO)

    number, kills, made = 0, 0, 0
    while True:
        number += 1
        killed = killed_at(number, node.settings, change)
        kills += killed
        bundle = find_bundle(NETWORK, node.settings.bundles_dir)  # what a screener reads: whole, the one or the other
        assert bundle.sha256 in (before.sha256, after.sha256)
        store = JobStore(url)
        registry = Registry(node.settings, store)
        moves = [c for c in registry.history(NETWORK) if c.kind in ("promoted", "rolled_back")]
        assert moves[-1].to_sha256 == bundle.sha256
        assert not store.model_changes(begun=True)
        assert all(fault is None for _, fault in registry.verify())
        assert not list(node.settings.bundles_dir.rglob(".part-*"))
        if bundle.sha256 == after.sha256:
            made += killed
            # and the way back still leads where it led before
            if act == "promote":
                registry.rollback(NETWORK, **WHO)
            else:
                registry.promote(NETWORK, "2.0.0", **WHO)
        store.close()
        if not killed:
            break
    assert kills > 10
    assert 0 < made < kills  # some before the link changed, some after


def test_killed_at_any_moment_a_registration_is_whole_or_not_there(tmp_path: Path) -> None:
    node = a_node(tmp_path)
    made = tiny_candidate(tmp_path / "1.0.0", "1.0.0")
    node.store.close()
    place = node.settings.bundles_dir / ".registry" / NETWORK / "1.0.0"
    number, absent, present = 0, 0, 0
    while killed_at(number := number + 1, node.settings, lambda registry: registry.register(made.path, **WHO)):
        if place.exists():
            assert read_bundle(place).sha256 == made.sha256
            present += 1
        else:
            absent += 1
    assert read_bundle(place).sha256 == made.sha256
    assert absent > 5
    assert present > 0
    assert not list(node.settings.bundles_dir.rglob(".part-*"))


def test_a_reader_never_meets_half_of_two_versions(tmp_path: Path) -> None:
    node = a_node(tmp_path)
    digests = {node.deployed().sha256, node.add("1.0.0").sha256}
    node.registry.promote(NETWORK, "1.0.0", **WHO)
    ended, seen, wrong = threading.Event(), set[str](), list[Exception]()

    def read() -> None:
        while not ended.is_set():
            try:
                bundle = find_bundle(NETWORK, node.settings.bundles_dir)
                bundle.load_weights()
                seen.add(bundle.sha256)
            except BundleError as error:
                wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4):
        node.registry.rollback(NETWORK, **WHO)
        node.registry.promote(NETWORK, "1.0.0", **WHO)
    ended.set()
    reader.join(30)
    assert not wrong
    assert seen <= digests


# --- the shadow and its comparison ------------------------------------------------------------------------------------


def shadow(job_id: int, pairs: list[tuple[float | None, float | None]], error: str | None = None) -> Shadow:
    levels = {
        f"L{index + 1}": {
            "bmd_g_cm2": candidate,
            "deployed_bmd_g_cm2": deployed,
            "class": None if candidate is None else "osteoporosis" if candidate < 0.8 else "normal",
            "deployed_class": None if deployed is None else "osteoporosis" if deployed < 0.8 else "normal",
        }
        for index, (candidate, deployed) in enumerate(pairs)
    }
    return Shadow(job_id, 1, "c" * 64, "d" * 64, datetime.now(UTC), 0.1 * job_id, error, levels)


def test_paired_differences_are_bland_and_altmans() -> None:
    draw = np.random.default_rng(4)
    rows, differences, means = [], [], []
    for job in range(1, 41):
        deployed = draw.normal(0.9, 0.15, 3)
        candidate = deployed + 0.03 + draw.normal(0, 0.01) + draw.normal(0, 0.02, 3)
        differences += list(candidate - deployed)
        means.append(float((candidate - deployed).mean()))
        rows.append(shadow(job, [(float(c), float(d)) for c, d in zip(candidate, deployed, strict=True)]))
    found = compare_shadow([*rows, shadow(41, [(None, 0.9)], error="out_of_time")])
    assert found.bmd is not None
    assert (found.studies, found.bmd.studies, found.bmd.vertebrae) == (41, 40, 120)
    assert found.bmd.bias_g_cm2 == pytest.approx(np.mean(means), abs=1e-4)
    low, high = found.bmd.bias_interval_95_g_cm2
    assert high - low == pytest.approx(2 * 2.0227 * np.std(means, ddof=1) / np.sqrt(40), abs=1e-4)
    assert low < 0.03 < high
    lower, upper = found.bmd.limits_of_agreement_g_cm2
    assert upper - lower == pytest.approx(2 * 1.96 * np.std(differences, ddof=1), abs=1e-4)
    assert found.failed == {"out_of_time": 1}
    assert found.class_vertebrae == 120
    same = np.mean([(c < 0.8) == (d < 0.8) for row in rows for c, d in [(v["bmd_g_cm2"], v["deployed_bmd_g_cm2"]) for v in row.levels.values()]])  # fmt: skip  # noqa: E501
    assert found.class_agreement == pytest.approx(same, abs=1e-4)
    few = compare_shadow(rows[:9])
    assert few.bmd is None
    assert few.class_vertebrae == 27
    assert compare_shadow([]).class_agreement is None


def test_a_shadow_is_of_the_networks_bundle_and_not_of_the_deployed_one(node: Node) -> None:
    with pytest.raises(ConfigurationError, match="it has no shadow"):
        node.registry.cast_shadow("spine-localizer", "1", **WHO)
    with pytest.raises(ConfigurationError, match="is not registered"):
        node.registry.cast_shadow(NETWORK, node.deployed().version, **WHO)
    candidate = node.add("1.0.0", None)  # a verdict is for a promotion
    node.registry.cast_shadow(NETWORK, "1.0.0", **WHO)
    found = node.registry.shadow(NETWORK)
    assert found is not None
    assert found.sha256 == candidate.sha256
    node.registry.cast_shadow(NETWORK, None, **WHO)
    assert node.registry.shadow(NETWORK) is None
    node.add("2.0.0")
    node.registry.cast_shadow(NETWORK, "2.0.0", **WHO)
    node.registry.promote(NETWORK, "2.0.0", **WHO)
    assert node.registry.shadow(NETWORK) is None  # deployed, it needs none


def test_the_commands(tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    shipped = find_bundle(NETWORK)
    made = tiny_candidate(tmp_path / "candidate", "1.0.0+here")

    def osteo(*arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(cli, ["models", *arguments, "--config", str(config)])
        assert done.exit_code == status, done.output + str(done.exception)
        return done.output

    assert made.sha256 in osteo("register", str(made.path), "--reason", "refit of November")
    rows = json.loads(osteo("list", "--json"))
    assert {(row["name"], row["version"], row["deployed"]) for row in rows} >= {
        (NETWORK, shipped.version, True),
        (NETWORK, "1.0.0+here", False),
    }
    osteo("shadow", "1.0.0+here", "--reason", "look")
    assert "shadow" in next(line for line in osteo("list").splitlines() if "1.0.0+here" in line)
    store = JobStore(f"sqlite:///{tmp_path / 'state' / 'jobs.sqlite'}")
    assert "fewer than 10 studies" in osteo("compare", "1.0.0+here")
    osteo("shadow", "--stop", "--reason", "seen")
    assert shipped.version in osteo("promote", "1.0.0+here", "--reason", "it is better")
    assert "is deployed again" in osteo("rollback", "--reason", "it is not")
    assert "refit of November" in osteo("history")
    shown = json.loads(osteo("show", "1.0.0+here", "--json"))
    assert shown["verdict_document"]["reasons"] == ["a test"]
    assert {change["kind"] for change in shown["history"]} == {"registered", "promoted", "rolled_back", "shadowed"}
    assert "a test" in osteo("show", "1.0.0+here")
    assert "FAIL" not in osteo("verify")
    refused = CliRunner().invoke(cli, ["models", "promote", "7", "--reason", "x", "--config", str(config)])
    assert isinstance(refused.exception, ConfigurationError)
    card = tmp_path / "state" / "models" / ".registry" / NETWORK / "1.0.0+here" / "docs" / "README.md"
    card.chmod(0o640)
    card.write_text("changed")
    assert "FAIL" in osteo("verify", status=1)
    store.close()


def test_the_commands_and_the_scheduler_do_without_torch(tmp_path: Path) -> None:
    """The registry is read and changed on machines and by processes that must stay small."""
    config = tmp_path / "osteo.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom osteo_daemon.cli import cli\n"
        "import osteo_daemon.scheduler, osteo_daemon.drift_watch\n"
        f"for words in (['models', 'list'], ['models', 'verify'], ['drift', 'run']):\n"
        f"    done = CliRunner().invoke(cli, [*words, '--config', {str(config)!r}])\n"
        "    assert done.exit_code == 0, done.output + repr(done.exception)\n"
        "assert not {'torch', 'monai'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
