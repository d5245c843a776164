"""Makes ``volumes.npz``: what the goldens are computed on, a vertebra of a virtual patient and two kinds of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from osteo_daemon.phantom.patient import VirtualPatient
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.study import render_voi

if __name__ == "__main__":
    vertebra = render_voi(VirtualPatient(seed=3), "L2", Scanner(seed=3), size=48).voxels
    centre = tuple(slice(s // 2 - h, s // 2 + h) for s, h in zip(vertebra.shape, (8, 10, 12), strict=True))
    generator = np.random.default_rng(11)
    smooth = ndimage.gaussian_filter(generator.normal(size=(14, 16, 18)), 1.2)
    white = generator.normal(140.0, 60.0, (10, 12, 12))
    ball = np.linalg.norm(np.indices((14, 16, 18)).T - np.array([6.5, 7.5, 8.5]), axis=-1).T < 6.5
    volumes = {"vertebra": vertebra[centre], "smooth": 150 + 200 * smooth / smooth.std() / 3, "white": white}
    masks = {
        "vertebra": np.ones(volumes["vertebra"].shape, bool),
        "smooth": ball,
        "white": generator.random(white.shape) > 0.2,
    }
    arrays = {f"{name}_hu": hu.round().astype(np.int16) for name, hu in volumes.items()}
    arrays |= {f"{name}_mask": mask for name, mask in masks.items()}
    np.savez_compressed(Path(__file__).parent / "volumes.npz", **arrays)
