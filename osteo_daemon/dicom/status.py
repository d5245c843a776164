"""C-STORE status values (PS3.4 B.2.3, PS3.7 annex C) and which error of the product becomes which."""

from __future__ import annotations

from enum import IntEnum

from osteo_daemon.errors import (
    ConflictingInstance,
    Damaged,
    DataSetMismatch,
    OsteoError,
    Transient,
    UnsupportedSopClass,
)


class StoreStatus(IntEnum):
    """What a sender hears."""

    SUCCESS = 0x0000  # the object is durable and its row is committed
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    OUT_OF_RESOURCES = 0xA700  # nothing was kept; send it again later
    DATA_SET_MISMATCH = 0xA900  # the data set is not the object that the command announces
    CANNOT_UNDERSTAND = 0xC000  # not a readable data set
    CONFLICTING_INSTANCE = 0xC010  # readable, but other pixels are stored under its UID; kept in quarantine
    PROCESSING_FAILURE = 0x0110  # an error of this node


def status_of(error: OsteoError) -> StoreStatus:
    """The status for an error of the store handler; by class alone."""
    if isinstance(error, Transient):
        return StoreStatus.OUT_OF_RESOURCES
    if isinstance(error, UnsupportedSopClass):
        return StoreStatus.SOP_CLASS_NOT_SUPPORTED
    if isinstance(error, DataSetMismatch):
        return StoreStatus.DATA_SET_MISMATCH
    if isinstance(error, ConflictingInstance):
        return StoreStatus.CONFLICTING_INSTANCE
    if isinstance(error, Damaged):
        return StoreStatus.CANNOT_UNDERSTAND
    return StoreStatus.PROCESSING_FAILURE
