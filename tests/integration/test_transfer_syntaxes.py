"""A CT in every transfer syntax it can arrive in: sent, stored as received, and measured in the same HU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points, metadata
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import UID, CTImageStorage
from pynetdicom import AE

from osteo_daemon.dicom.contexts import TRANSFER_SYNTAXES
from osteo_daemon.imaging.codecs import DECODERS
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.series import split_stacks
from osteo_daemon.imaging.slices import ct_slices, read_headers
from osteo_daemon.imaging.volume import CtVolume
from osteo_daemon.jobs.store import JobStore
from tests.compressed_ct import SYNTAXES, Syntax, torso
from tests.ct_series import column, write_slices
from tests.fakes import CALLED, CALLING, LOOPBACK, local_receiver, storescu

COUNT, SIZE = 3, 96


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, JobStore]]:
    folder = tmp_path_factory.mktemp("syntaxes")
    with local_receiver(folder) as port:
        store = JobStore(f"sqlite:///{folder / 'state' / 'jobs.sqlite'}")
        yield port, store
        store.close()


def _volume(paths: list[Path]) -> CtVolume:
    headers, unreadable = read_headers(paths)
    assert not unreadable
    (slices,) = ct_slices(headers).values()
    (stack,) = split_stacks(slices)
    return read_volume(stack)


def _send(port: int, syntax: Syntax, files: list[Path]) -> None:
    if syntax.option:
        sent = storescu(port, files, syntax.option)
        assert sent.returncode == 0, sent.stderr
        return
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(CTImageStorage, syntax.uid)
    association = entity.associate(LOOPBACK, port, ae_title=CALLED)
    assert association.is_established
    for path in files:
        assert association.send_c_store(dcmread(path)).Status == 0x0000
    association.release()


def test_every_accepted_syntax_is_tested() -> None:
    assert {syntax.uid for syntax in SYNTAXES} == set(TRANSFER_SYNTAXES)


def test_decoders_are_permissively_licensed_and_no_other_is_found() -> None:
    """A library that pylibjpeg finds beside its own (one of them is under the GPL) would decode, too."""
    libraries = {"pydicom", "python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls"}
    for library in libraries:
        classifiers = metadata(library).get_all("Classifier") or []
        (licence,) = [entry.rpartition(" :: ")[2] for entry in classifiers if entry.startswith("License :: ")]
        assert licence in ("MIT License", "BSD License", "Apache Software License"), library
    found = entry_points(group="pylibjpeg.pixel_data_decoders")
    assert {entry.dist.name for entry in found if entry.dist is not None} <= libraries
    assert {syntax for syntax, name in DECODERS.items() if name == "pylibjpeg"} == {UID(entry.name) for entry in found}
    assert set(DECODERS.values()) <= {"pydicom", "gdcm", "pylibjpeg", "pyjpegls", "osteo"}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.uid.keyword)
def test_sent_stored_as_received_and_decoded(receiver: tuple[int, JobStore], tmp_path: Path, syntax: Syntax) -> None:
    port, store = receiver
    originals = write_slices(tmp_path / "original", torso(COUNT, SIZE), column(COUNT, 3.0))
    files = []
    for path in originals:
        files.append(tmp_path / path.name)
        syntax.encode(path, files[-1])
        assert dcmread(files[-1]).file_meta.TransferSyntaxUID == syntax.uid
    _send(port, syntax, files)

    study = str(dcmread(originals[0]).StudyInstanceUID)
    job = store.job(study)
    assert job is not None
    stored = store.instances(job)
    assert {entry.transfer_syntax_uid for entry in stored} == {syntax.uid}
    sent = {str(dataset.SOPInstanceUID): dataset.PixelData for dataset in map(dcmread, files)}
    for entry in stored:
        assert dcmread(entry.path).PixelData == sent[entry.sop_instance_uid]

    expected, found = _volume(originals), _volume([entry.path for entry in stored])
    assert np.array_equal(found.affine, expected.affine)
    error = np.abs(found.voxels - expected.voxels)
    assert error.max() <= syntax.tolerance_hu * 6, error.max()
    assert error.mean() <= syntax.tolerance_hu, error.mean()
    assert (error.max() == 0) == (syntax.tolerance_hu == 0)
