"""The parts of MONAI are MONAI's own, quickly imported, and leave no trace."""

from __future__ import annotations

import subprocess
import sys

import torch
from monai.networks.nets import UNet
from monai.networks.nets.resnet import ResNetBlock

from osteo_daemon.network import monai_parts
from tests.conftest import ROOT


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_rest_is_not_imported_and_who_wants_it_gets_it() -> None:
    said = _run(
        "import sys\n"
        "from osteo_daemon.network.encoder import VertebraEncoder\n"
        "from osteo_daemon.network.localizer import SpineLocalizerNet\n"
        "print(sorted({'monai', 'sklearn', 'nibabel', 'scipy.stats', 'scipy.signal'} & set(sys.modules)))\n"
        "import monai\n"
        "print(monai.__version__, monai.transforms.Compose.__name__, monai.networks.nets.UNet.__name__)\n"
    ).splitlines()
    assert said[0] == "[]"
    assert said[1].endswith("Compose UNet")


def test_they_compute_what_monais_compute() -> None:
    made = [
        ({"in_channels": 2, "out_channels": 3, "channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 2}, "unet"),
        ({"in_planes": 4, "planes": 4, "spatial_dims": 3, "norm": ("group", {"num_groups": 2})}, "block"),
    ]
    for options, kind in made:
        ours, theirs = (monai_parts.UNet, UNet) if kind == "unet" else (monai_parts.ResNetBlock, ResNetBlock)
        more = {"spatial_dims": 3, "norm": "INSTANCE"} if kind == "unet" else {}
        torch.manual_seed(1)
        one = ours(**{**options, **more})
        torch.manual_seed(1)
        other = theirs(**{**options, **more})
        assert (one.__class__.__module__, one.__class__.__qualname__) == (
            other.__class__.__module__,
            other.__class__.__qualname__,
        )
        assert one.state_dict().keys() == other.state_dict().keys()
        image = torch.rand(1, 2 if kind == "unet" else 4, 16, 16, 16)
        torch.testing.assert_close(one(image), other(image), rtol=0, atol=0)


def test_another_layout_falls_back_to_the_whole() -> None:
    said = _run(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find, gone = PathFinder.find_spec, ['monai.networks.blocks']\n"
        "def first_not(name, path=None, target=None):\n"
        "    return gone.remove(name) if name in gone else find(name, path, target)\n"
        "PathFinder.find_spec = first_not\n"
        "from osteo_daemon.network.monai_parts import UNet\n"
        "print(gone, 'monai.transforms' in sys.modules, UNet.__module__)\n"
    )
    assert said.split() == ["[]", "True", "monai.networks.nets.unet"]


def test_what_is_imported_already_is_used() -> None:
    code = "import monai.networks.nets as n\nfrom osteo_daemon.network.monai_parts import UNet\nprint(UNet is n.UNet)\n"
    assert _run(code).strip() == "True"
