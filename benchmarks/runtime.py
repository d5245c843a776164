"""What speeds the network up here: memory format, bfloat16, torch.compile, ONNX Runtime.

    python -m benchmarks.runtime

One vertebra at a time in one thread, as the daemon runs it, in CPU seconds and in turns. Besides its time each variant
says how far its BMD lies from that of the plain one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write_result
from osteo_daemon.inference.bundle import find_bundle
from train.onnx_export import export_bundle, network_of

ROUNDS = 10


def onnx_runner(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """BMD by ONNX Runtime in one thread."""
    import onnxruntime

    export_bundle(find_bundle("osteo-moe"), folder / "network.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
    return lambda hu, level: torch.from_numpy(session.run(["bmd"], {"hu": hu.numpy(), "level": level.numpy()})[0])


def main() -> None:
    """Write ``docs/results/runtime.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, neither torch.compile nor ONNX")
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = network_of(find_bundle("osteo-moe"))
    plain = copy.deepcopy(network)
    plain.encoder.to(memory_format=torch.contiguous_format)

    def half(hu: Tensor, level: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(hu, level).bmd.float()

    variants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "contiguous": lambda hu, level: plain(hu, level).bmd,
        "channels last (used)": lambda hu, level: network(hu, level).bmd,
        "channels last, bfloat16": half,
    }
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if not given.quick:
            compiled = torch.compile(network)
            variants["channels last, torch.compile"] = lambda hu, level: compiled(hu, level).bmd
        generator = torch.Generator().manual_seed(0)
        hu = 150 + 50 * torch.randn((1, *network.config.voi_shape), generator=generator)
        level = torch.tensor([2])
        if not given.quick:
            with torch.inference_mode(mode=False):
                variants["ONNX Runtime"] = onnx_runner(Path(folder))
        first: dict[str, float] = {}
        values: dict[str, float] = {}
        for name, run in list(variants.items()):
            start = time.process_time()
            try:
                values[name] = float(run(hu, level))
            except RuntimeError as error:  # no compiler, or no bfloat16 on this processor
                failed[name] = type(error).__name__
                del variants[name]
                continue
            first[name] = time.process_time() - start
        spent: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(2 if given.quick else ROUNDS):
            for name, run in variants.items():
                start = time.process_time()
                run(hu, level)
                spent[name].append(time.process_time() - start)
    base = values["contiguous"]
    figures: dict[str, Any] = {
        "bundle": find_bundle("osteo-moe").version,
        "bfloat16_in_hardware": torch.backends.mkldnn.is_available() and "amx_bf16" in _flags(),
        "one_vertebra": {
            name: {
                "cpu_s": round(statistics.median(spent[name]), 4),
                "first_call_cpu_s": round(first[name], 2),
                "bmd_moved_g_cm2": round(abs(values[name] - base), 6),
            }
            for name in variants
        },
        **({"failed": failed} if failed else {}),
    }
    print(write_result("runtime", figures, quick=given.quick))


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


if __name__ == "__main__":
    main()
