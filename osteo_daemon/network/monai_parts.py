"""The parts of MONAI that the networks are made of, without the rest of it.

``import monai`` imports every module that MONAI has, and with them scikit-learn, nibabel and much of scipy where they
are installed: three seconds of a processor at each start of a worker or of `osteo screen`, more than a third of all its
imports. The networks need a residual block and a U-Net. Their files are MONAI's own and unchanged; only the
``__init__`` of four packages, which would import all the rest, is passed over. No trace is left: who imports MONAI
later gets the whole.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


def _passed_over(name: str, **names: Any) -> None:
    """Put a package in place whose ``__init__`` does not run; it has these ``names`` only."""
    parent = name.rpartition(".")[0]
    spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None:
        raise ImportError(name)
    package = module_from_spec(spec)
    vars(package).update(names)
    sys.modules[name] = package


def _few() -> tuple[ModuleType, ModuleType]:
    """The modules of both networks, alone.

    Raises:
        ImportError: this MONAI is laid out otherwise.
        AttributeError: likewise.
    """
    _passed_over("monai", __version__=importlib.metadata.version("monai"))
    _passed_over("monai.apps")
    importlib.import_module("monai.networks")
    _passed_over("monai.networks.blocks")
    sys.modules["monai.networks.blocks"].ADN = importlib.import_module("monai.networks.blocks.acti_norm").ADN  # type: ignore[attr-defined]
    _passed_over("monai.networks.nets")
    return importlib.import_module("monai.networks.nets.resnet"), importlib.import_module("monai.networks.nets.unet")


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        del sys.modules[name]


def _modules() -> tuple[ModuleType, ModuleType]:
    if "monai" not in sys.modules:
        try:
            return _few()
        except (ImportError, AttributeError):
            pass  # a MONAI that is laid out otherwise: the whole of it, then
        finally:
            _forget()
    return importlib.import_module("monai.networks.nets.resnet"), importlib.import_module("monai.networks.nets.unet")


_resnet, _unet = _modules()
ResNetBlock: Any = _resnet.ResNetBlock
UNet: Any = _unet.UNet
