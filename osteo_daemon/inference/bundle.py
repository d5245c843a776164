"""Model bundles: a network's weights together with everything needed to use them, verified before use.

The layout is that of a MONAI bundle, so that MONAI's tools can read it::

    <bundle>/configs/metadata.json     name, version, status, versions of the libraries, data format
    <bundle>/configs/network.json      the network's configuration, plain values
    <bundle>/configs/inference.json    preprocessing and calibration, plain values
    <bundle>/models/model.safetensors  the weights
    <bundle>/docs/README.md            the model card
    <bundle>/LICENSE
    <bundle>/MANIFEST.sha256           the digest of every other file, in the format of sha256sum

A MONAI configuration may hold expressions that run code (GHSA-873f-pvrv-4x83). Nothing here instantiates one: the
JSON files are plain values for this project's own typed configurations, and a string that MONAI would evaluate is
refused. Weights are safetensors only, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from osteo_daemon.errors import BundleError

if TYPE_CHECKING:
    import torch

BundleStatus = Literal["investigational", "clinical"]

BUNDLE_SCHEMA: Final = "osteo-bundle/1"
MANIFEST_NAME: Final = "MANIFEST.sha256"
WEIGHTS_NAME: Final = "models/model.safetensors"
CONFIG_NAMES: Final = ("metadata", "network", "inference")
REQUIRED_FILES: Final = (
    *(f"configs/{name}.json" for name in CONFIG_NAMES),
    WEIGHTS_NAME,
    "docs/README.md",
    "LICENSE",
)
SHIPPED_BUNDLES: Final = "model_zoo"
"""The one declared data path: beside the package in a checkout, inside it in an installed wheel (pyproject.toml)."""

_MONAI_METADATA_SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MANIFEST_LINE: Final = re.compile(r"([0-9a-f]{64})  (\S.*)")
_READ_AGAIN: Final = "restore the bundle from where it came from, or install the package again"


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """A verified bundle.

    Attributes:
        name: the bundle's name, also its folder's name in `SHIPPED_BUNDLES`.
        version: the bundle's version.
        status: "clinical" only for a bundle promoted on a site's own DXA pairs.
        sha256: hexadecimal digest of the manifest, which holds the digest of every file: it names the exact bytes.
        path: the bundle's folder.
        metadata: configs/metadata.json.
        network: configs/network.json, read with the network's own typed configuration.
        inference: configs/inference.json, preprocessing and calibration.
        files: relative POSIX path to hexadecimal sha256 of each file.
    """

    name: str
    version: str
    status: BundleStatus
    sha256: str
    path: Path
    metadata: Mapping[str, Any]
    network: Mapping[str, Any]
    inference: Mapping[str, Any]
    files: Mapping[str, str]

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The weights on the CPU, by parameter name.

        Raises:
            BundleError: as of `load_tensors`.
        """
        return self.load_tensors(WEIGHTS_NAME)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file in safetensors format, on the CPU.

        The digest is checked again on the very bytes that are parsed.

        Raises:
            BundleError: the bundle has no such file, it has gone or changed since the bundle was read, or is not in
                safetensors format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path / name
        if name not in self.files:
            raise BundleError(f"{path} is missing; {_READ_AGAIN}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); {_READ_AGAIN}") from error
        if hashlib.sha256(content).hexdigest() != self.files[name]:
            raise BundleError(f"{path} changed after the bundle was verified; restart to read it")
        try:
            return cast("dict[str, torch.Tensor]", load(content))
        except SafetensorError as error:
            raise BundleError(f"{path} is not in safetensors format; {_READ_AGAIN}") from error


def read_bundle(path: str | Path) -> ModelBundle:
    """Read and verify the bundle in the folder ``path``.

    Raises:
        BundleError: a file is missing, was added or changed, is a link, is not valid JSON, or the schema is another;
            the message names the file and what to do.
    """
    root = Path(path)
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder; set the path of a bundle or install the package again")
    manifest, digest = _read_manifest(root)
    present = set(_files_below(root)) - {MANIFEST_NAME}
    for name in REQUIRED_FILES:
        if name not in manifest:
            raise BundleError(f"{root / MANIFEST_NAME} does not list {name}; {_READ_AGAIN}")
    for name in sorted(set(manifest) - present):
        raise BundleError(f"{root / name} is missing; {_READ_AGAIN}")
    for name in sorted(present - set(manifest)):
        raise BundleError(f"{root / name} is not in {MANIFEST_NAME}; remove it")
    for name, expected in manifest.items():
        if _sha256_of(root / name) != expected:
            raise BundleError(f"{root / name} differs from its digest in {MANIFEST_NAME}; {_READ_AGAIN}")
    configs = {name: _read_config(root / "configs" / f"{name}.json") for name in CONFIG_NAMES}
    metadata = configs["metadata"]
    metadata_path = root / "configs" / "metadata.json"
    if metadata.get("osteo_schema") != BUNDLE_SCHEMA:
        raise BundleError(
            f"{metadata_path} has osteo_schema {metadata.get('osteo_schema')!r}, this version reads {BUNDLE_SCHEMA!r}; "
            "use a bundle made for this version"
        )
    status = metadata.get("status")
    if status not in get_args(BundleStatus):
        raise BundleError(f"{metadata_path} has status {status!r}, not one of {', '.join(get_args(BundleStatus))}")
    for key in ("name", "version"):
        if not isinstance(metadata.get(key), str) or not metadata[key]:
            raise BundleError(f"{metadata_path} has no {key}; {_READ_AGAIN}")
    return ModelBundle(
        name=metadata["name"],
        version=metadata["version"],
        status=cast("BundleStatus", status),
        sha256=digest,
        path=root,
        metadata=MappingProxyType(metadata),
        network=MappingProxyType(configs["network"]),
        inference=MappingProxyType(configs["inference"]),
        files=MappingProxyType(manifest),
    )


def write_bundle(
    path: str | Path,
    *,
    name: str,
    version: str,
    status: BundleStatus,
    metadata: Mapping[str, Any],
    network: Mapping[str, Any],
    inference: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    model_card: str,
    licence: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> ModelBundle:
    """Write a bundle into the folder ``path`` and read it back; a bundle that stood there is replaced as a whole.

    Args:
        path: the bundle's folder; its parent is made when missing.
        name: lower-case name.
        version: the bundle's version.
        status: "investigational" or "clinical".
        metadata: task, description, authorship, copyright, network_data_format and more; the schemas, the name, the
            version, the status and the versions of the libraries are added.
        network: plain JSON values.
        inference: plain JSON values.
        weights: tensors by parameter name; written contiguous, from the CPU.
        model_card: Markdown of docs/README.md.
        licence: text of LICENSE.
        extra_files: further files by relative POSIX path, for example ``docs/figures.png``.

    Raises:
        BundleError: a value cannot be written, or MONAI would evaluate it.
    """
    from safetensors.torch import save

    if not _NAME.fullmatch(name):
        raise BundleError(f"the name {name!r} is not of the form {_NAME.pattern}")
    root = Path(path)
    contents: dict[str, bytes] = {
        "configs/metadata.json": _as_json(
            {
                "schema": _MONAI_METADATA_SCHEMA,
                "osteo_schema": BUNDLE_SCHEMA,
                "name": name,
                "version": version,
                "status": status,
                **_library_versions(),
                **metadata,
            },
            "metadata",
        ),
        "configs/network.json": _as_json(network, "network"),
        "configs/inference.json": _as_json(inference, "inference"),
        WEIGHTS_NAME: save({key: value.detach().cpu().contiguous() for key, value in weights.items()}),
        "docs/README.md": model_card.encode(),
        "LICENSE": licence.encode(),
    }
    for extra, content in (extra_files or {}).items():
        if extra in contents or extra == MANIFEST_NAME or not _is_plain_relative(extra):
            raise BundleError(f"the extra file {extra!r} needs a plain relative path of its own")
        contents[extra] = content
    contents[MANIFEST_NAME] = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in sorted(contents.items())
    ).encode()
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        staging.chmod(0o755)
        for file, content in contents.items():
            target = staging / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        read_bundle(staging)
        old = staging.with_name(staging.name + "-old")
        if root.exists():
            root.rename(old)
        staging.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return read_bundle(root)


def find_bundle(name: str, models_dir: str | Path | None = None) -> ModelBundle:
    """Find, read and verify the bundle ``name``: a site's own in ``models_dir`` first, else the shipped one.

    Raises:
        BundleError: there is none of that name, or the first one found is damaged.
    """
    return read_bundle(_place(name, models_dir))


def bundle_digest(name: str, models_dir: str | Path | None = None) -> str:
    """Digest of the bundle that `find_bundle` would read now; nothing but its manifest is read.

    Raises:
        BundleError: there is none of that name.
    """
    path = _place(name, models_dir) / MANIFEST_NAME
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {_READ_AGAIN}") from error


def _place(name: str, models_dir: str | Path | None) -> Path:
    if not _NAME.fullmatch(name):
        raise BundleError(f"the name {name!r} is not of the form {_NAME.pattern}")
    places = [*([Path(models_dir)] if models_dir is not None else []), *_shipped_places()]
    for place in places:
        if (place / name / MANIFEST_NAME).is_file():
            # through the registry's link, once: a promotion meanwhile must not give halves of two versions
            return (place / name).resolve()
    raise BundleError(f"no bundle {name!r} in {', '.join(map(str, places))}; install the package again or set its path")


def shipped_bundle(name: str) -> Path | None:
    """The folder of a bundle that came with the package; None when there is none of that name."""
    return next((place / name for place in _shipped_places() if (place / name / MANIFEST_NAME).is_file()), None)


def is_shipped(path: Path) -> bool:
    """True for the folder of a bundle that came with the package."""
    return any(path.resolve().is_relative_to(place.resolve()) for place in _shipped_places())


def _shipped_places() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package / SHIPPED_BUNDLES, package.parent / SHIPPED_BUNDLES]


def _read_manifest(root: Path) -> tuple[dict[str, str], str]:
    path = root / MANIFEST_NAME
    try:
        content = path.read_bytes()
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is missing or unreadable; {_READ_AGAIN}") from error
    manifest: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None or not _is_plain_relative(match[2]) or match[2] in manifest:
            raise BundleError(f"{path} line {number} is not 'digest  relative/path'; {_READ_AGAIN}")
        manifest[match[2]] = match[1]
    return manifest, hashlib.sha256(content).hexdigest()


def _is_plain_relative(name: str) -> bool:
    return not name.startswith("/") and "\\" not in name and all(p not in ("", ".", "..") for p in name.split("/"))


def _files_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        for entry in (*folders, *files):
            if (Path(folder) / entry).is_symlink():
                raise BundleError(f"{Path(folder) / entry} is a link; a bundle holds plain files only")
        for file in files:
            yield (Path(folder) / file).relative_to(root).as_posix()


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {_READ_AGAIN}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON; {_READ_AGAIN}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} is not a JSON object; {_READ_AGAIN}")
    _refuse_expressions(value, str(path))
    return value


def _refuse_expressions(value: object, where: str) -> None:
    """MONAI's parser evaluates ``$...``, follows ``@...`` and ``%...`` and calls ``_target_``: none may stand."""
    if isinstance(value, str) and value[:1] in ("$", "@", "%"):
        raise BundleError(
            f"{where} holds the expression {value[:40]!r}; a bundle of this project holds plain values only"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            if key.startswith(("_target_", "$", "@", "%")):
                raise BundleError(f"{where} holds the key {key!r}; a bundle of this project holds plain values only")
            _refuse_expressions(item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_expressions(item, where)


def _as_json(value: Mapping[str, Any], name: str) -> bytes:
    try:
        text = json.dumps(dict(value), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(f"configs/{name}.json would hold a value that JSON cannot: {error}") from error
    _refuse_expressions(json.loads(text), f"configs/{name}.json")
    return (text + "\n").encode()


def _library_versions() -> dict[str, Any]:
    """The keys MONAI's metadata schema asks for, from the installed packages."""
    from importlib.metadata import version

    return {
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"safetensors": version("safetensors")},
        "optional_packages_version": {},
    }
