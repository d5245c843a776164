"""The story in small: one labelled study is received, the other patients' vertebrae are derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.refit_story.story import QUICK, Story


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes, one after another: minutes on a machine that others use, too
def test_a_site_refits_shadows_promotes_and_rolls_back(tmp_path: Path) -> None:
    Story(tmp_path, QUICK, print).run()
