"""What a refit may not forget: features of virtual patients of the parent's own sites, small enough to travel.

    python -m train.replay --parent model_zoo/osteo-moe --out runs/replay.safetensors --patients 96

renders virtual patients that nobody trained on, runs the parent's encoder over them and keeps the features with the
truth. A bundle carries the file (`REPLAY_NAME`): `train.export` makes it of the cohort's test patients, whom nobody
trained on either, without rendering any. Since a refit leaves the encoder as it is, the file stays right for every
later generation. There is no patient in it (docs/decisions/0010-site-refit.md).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from osteo_daemon.errors import BundleError
from osteo_daemon.inference.bundle import ModelBundle, read_bundle
from osteo_daemon.network.config import MoEConfig
from osteo_daemon.network.multitask import MultitaskMoE
from train.cohort import CohortConfig, make_cohort
from train.data import VoiSet, open_set
from train.features import Features, Index, encode_rows
from train.shrink import SPACING_MM, shrink_cohort

REPLAY_NAME: Final = "models/replay.safetensors"
"""File of a bundle; an older one without it is refitted with a file made by this module."""
PATIENTS: Final = 96
SEED: Final = 20911
"""Of the virtual patients: another one than any cohort's that networks were trained on."""
_RENDERED_SPACING_MM: Final = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """N vertebrae of other devices than the site's.

    Attributes:
        features: of the parent's frozen encoder.
        patient: (N,) long, a number for each virtual patient.
        device: (N,) long, index of the densitometer among the parent's devices, -1 for none of them.
        sbmd: (N,) float true sBMD in g/cm2, NaN beyond L1-L4.
        diagnosis: (N,) long class of that, -1 beyond L1-L4.
    """

    features: Features
    patient: Tensor
    device: Tensor
    sbmd: Tensor
    diagnosis: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def take(self, chosen: Tensor) -> Replay:
        """The chosen vertebrae."""
        return Replay(
            self.features.take(chosen),
            self.patient[chosen],
            self.device[chosen],
            self.sbmd[chosen],
            self.diagnosis[chosen],
        )

    def halves(self) -> tuple[Replay, Replay]:
        """One half of the patients to rehearse, the other to judge with: no patient lies in both."""
        held = self.patient % 2 == 0
        return self.take((~held).nonzero().squeeze(1)), self.take(held.nonzero().squeeze(1))

    def to_bytes(self) -> bytes:
        """In safetensors format, features in half precision."""
        features = {
            f"features.{name}": value.half() if value.is_floating_point() else value
            for name, value in self.features.tensors().items()
        }
        own = {name: getattr(self, name).contiguous() for name in ("patient", "device", "sbmd", "diagnosis")}
        return bytes(save({**features, **own}))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], network: MultitaskMoE) -> Replay:
        """Read what `to_bytes` wrote.

        Raises:
            BundleError: it was made for another network.
        """
        try:
            features = Features(
                *(
                    tensors[f"features.{name}"].float() if name != "level" else tensors["features.level"]
                    for name in Features.__dataclass_fields__
                )
            )
            found = cls(features, *(tensors[name] for name in ("patient", "device", "sbmd", "diagnosis")))
        except KeyError as error:
            raise BundleError(f"the replay set has no {error.args[0]}; make it anew with train.replay") from error
        if features.image.shape[1] != network.encoder.width:
            raise BundleError("the replay set was made for another network; make it anew with train.replay")
        return found


def replay_of(
    network: MultitaskMoE, data: VoiSet, devices: list[str], torch_device: torch.device, index: Index | None = None
) -> Replay:
    """Vertebrae of a virtual cohort as a replay set: the rows ``index``, or all."""
    chosen = np.arange(len(data.rows)) if index is None else index
    rows = [data.rows[i] for i in chosen]
    patients = {name: number for number, name in enumerate(dict.fromkeys(row.patient for row in rows))}
    return Replay(
        encode_rows(network, data, chosen, torch_device),
        torch.tensor([patients[row.patient] for row in rows]),
        torch.tensor([devices.index(row.device) if row.device in devices else -1 for row in rows]),
        torch.tensor([float("nan") if row.sbmd_g_cm2 is None else row.sbmd_g_cm2 for row in rows]),
        torch.tensor([row.true_diagnosis for row in rows]),
    )


def replay_of_cohort(network: MultitaskMoE, data: VoiSet, devices: list[str], patients: int = PATIENTS) -> Replay:
    """The first so many test patients of the cohort that the network was trained on, encoded on the CPU."""
    names = dict.fromkeys(row.patient for row in data.rows if row.part == "test")
    chosen = set(list(names)[:patients])
    index = np.array([i for i, row in enumerate(data.rows) if row.patient in chosen], dtype=np.int64)
    return replay_of(network, data, devices, torch.device("cpu"), index)


def load_network(bundle: ModelBundle) -> MultitaskMoE:
    """The network of a bundle, on the CPU.

    Raises:
        BundleError: weights and configuration do not belong together.
    """
    network = MultitaskMoE(MoEConfig.from_json(bundle.network))
    try:
        network.load_state_dict(bundle.load_weights())
    except RuntimeError as error:
        raise BundleError(f"the weights of {bundle.name} do not fit its configs/network.json") from error
    return network.eval()


def devices_of(bundle: ModelBundle) -> list[str]:
    """Densitometers that the bundle's first experts stand for."""
    return [str(name) for name in bundle.inference.get("training", {}).get("devices", [])]


def render_replay(bundle: ModelBundle, patients: int, workers: int, device: torch.device, seed: int = SEED) -> Replay:
    """Render virtual patients of the parent's sites and encode them.

    Raises:
        BundleError: the network's grid is none that virtual patients are rendered on.
    """
    network = load_network(bundle)
    config = network.config
    with tempfile.TemporaryDirectory(prefix="osteo-replay-") as place:
        folder = Path(place) / "cohort"
        whole = CohortConfig.read(patients=patients, external_share=0.0, seed=seed)
        if config.voi_spacing_mm == _RENDERED_SPACING_MM:
            make_cohort(replace(whole, voi_shape=config.voi_shape), folder, workers)
        elif config.voi_spacing_mm == SPACING_MM:
            make_cohort(whole, folder, workers)
            shrink_cohort(folder, Path(place) / "small", workers)
            folder = Path(place) / "small"
        else:
            raise BundleError(f"virtual patients are rendered at 1 or {SPACING_MM} mm, not {config.voi_spacing_mm} mm")
        return replay_of(network, open_set(folder), devices_of(bundle), device)


def find_replay(bundle: ModelBundle, network: MultitaskMoE, path: Path | None) -> Replay:
    """The replay set in ``path``, or the one that the bundle carries.

    Raises:
        BundleError: there is none, or it was made for another network.
    """
    if path is not None:
        return Replay.from_tensors(load(path.read_bytes()), network)
    if REPLAY_NAME not in bundle.files:
        raise BundleError(
            f"{bundle.name} {bundle.version} carries no {REPLAY_NAME}; make one with "
            f"'python -m train.replay --parent {bundle.path} --out replay.safetensors' and name it with --replay"
        )
    return Replay.from_tensors(bundle.load_tensors(REPLAY_NAME), network)


def main() -> None:
    """Command line of ``python -m train.replay``."""
    parser = argparse.ArgumentParser(description="features of virtual patients that a refit may not forget")
    parser.add_argument("--parent", type=Path, default=Path("model_zoo/osteo-moe"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=PATIENTS)
    parser.add_argument("--data", type=Path, help="a rendered cohort on the network's grid, instead of rendering one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    bundle, device = read_bundle(given.parent), torch.device(given.device)
    if given.data is None:
        found = render_replay(bundle, given.patients, given.workers, device)
    else:
        found = replay_of(load_network(bundle), open_set(given.data), devices_of(bundle), device)
    content = found.to_bytes()
    temporary = given.out.with_name(given.out.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(given.out)
    print(f"{given.out}: {len(found)} vertebrae of {len(found.patient.unique())} patients, {len(content)} bytes")


if __name__ == "__main__":
    main()
