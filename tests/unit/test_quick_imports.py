"""The garbage collector rests while a role is imported, and works afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from osteo_daemon.quick_imports import quick_imports


def test_it_rests_within_and_works_afterwards() -> None:
    before = gc.get_freeze_count()
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ImportError), quick_imports():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
