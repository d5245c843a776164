"""Makes ``goldens.json`` from ``volumes.npz`` with PyRadiomics; needs an environment of its own, not the project's.

    python -m venv pyradiomics && pyradiomics/bin/pip install "numpy<2" setuptools wheel versioneer cython
    pyradiomics/bin/pip install --no-build-isolation pyradiomics==3.0.1
    pyradiomics/bin/python tests/golden/texture/make_goldens.py

Directional matrices are merged before features are computed (``weightingNorm`` "no_weighting"), as the product does.
With ``--seconds N`` it measures its own speed instead: CPU seconds for each volume, the median of N rounds.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import radiomics
import SimpleITK as sitk  # noqa: N813 - its own usual name
from radiomics import firstorder, glcm, gldm, glrlm, glszm, ngtdm

HERE = Path(__file__).parent
FAMILIES = {
    "firstorder": firstorder.RadiomicsFirstOrder,
    "glcm": glcm.RadiomicsGLCM,
    "glrlm": glrlm.RadiomicsGLRLM,
    "glszm": glszm.RadiomicsGLSZM,
    "gldm": gldm.RadiomicsGLDM,
    "ngtdm": ngtdm.RadiomicsNGTDM,
}
BIN_WIDTH_HU = 25.0


def features(hu: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Every feature of the six families of a (D, H, W) volume of HU inside its mask."""
    image, region = sitk.GetImageFromArray(hu.astype(np.float64)), sitk.GetImageFromArray(mask.astype(np.uint8))
    found = {}
    for family, extractor in FAMILIES.items():
        calculator = extractor(
            image, region, binWidth=BIN_WIDTH_HU, weightingNorm="no_weighting", symmetricalGLCM=True, force2D=False
        )
        calculator.enableAllFeatures()
        found.update({f"{family}_{name}": float(value) for name, value in calculator.execute().items()})
    return found


def main() -> None:
    """Write the goldens, or print seconds for each volume."""
    logging.getLogger("radiomics").setLevel(logging.ERROR)
    if sys.argv[1:2] == ["--seconds"]:
        with np.load(sys.argv[3]) as volumes:
            hu, mask = volumes["hu"], volumes["mask"]
        spent = []
        for _ in range(int(sys.argv[2])):
            start = time.process_time()
            for one, inside in zip(hu, mask, strict=True):
                features(one, inside)
            spent.append((time.process_time() - start) / len(hu))
        print(json.dumps({"seconds_each": statistics.median(spent), "version": radiomics.__version__}))
        return
    with np.load(HERE / "volumes.npz") as volumes:
        names = sorted({name.rpartition("_")[0] for name in volumes})
        document = {
            "made_by": f"PyRadiomics {radiomics.__version__}, numpy {np.__version__}",
            "bin_width_hu": BIN_WIDTH_HU,
            "volumes": {name: features(volumes[f"{name}_hu"], volumes[f"{name}_mask"]) for name in names},
        }
    (HERE / "goldens.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
