"""The stage `where`: describes this machine, and measures the speed of its parts."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..timing import drop_page_cache, machine, resident_pages
from . import copy_probes, disk_probes, file_system, kernel_probes
from .device import NO_CUDA, alive_on, require_cuda
from .results import Clock, Record, Results
from .settings import Settings

PACKAGES = (
    "transformers",
    "torch",
    "triton",
    "numpy",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "accelerate",
    "xxhash",
    "filelock",
    "pytest",
    "hf-contiguouskv",
)
SMI_FIELDS = (
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "power.limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.max.mem",
)
# A probe counts as hung after this many seconds.
HUNG_S = 15.0


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Run each probe separately, so that a failed probe does not affect the others."""
    if not settings.rehearse:
        require_cuda()
    record = Record(results, "where", clock, settings.folder, alive_on(settings))
    for name, probe in probes(settings).items():
        if clock.left <= 0:
            record.failed.setdefault(name, "not measured: no time was left")
        else:
            record.step(name, probe, HUNG_S)
    results.flush()


def probes(settings: Settings) -> dict[str, Callable[[], Any]]:
    """The probes, in order; without CUDA, probes that need it report so."""
    device = torch.device(settings.device)
    folder = Path(settings.folder)
    on_device: dict[str, Callable[[], Any]] = {
        "card": card,
        "new attention shapes": lambda: kernel_probes.attention_shapes(device),
        "pinned allocation": copy_probes.pinned_allocation,
        "registration": copy_probes.registration,
        "direct reads into memory": lambda: copy_probes.direct_reads(folder),
        "copies": lambda: copy_probes.copy_speeds(device),
        "launches": lambda: kernel_probes.launches(device),
        "synchronisation": lambda: kernel_probes.synchronisation(device),
        "arithmetic": lambda: kernel_probes.arithmetic(device),
    }
    if settings.rehearse:
        on_device = {name: lambda: NO_CUDA for name in on_device}
    return {
        "versions": versions,
        "machine": machine,
        "file system": lambda: file_system.describe(folder) | {"lets go of pages": lets_go(folder)},
        **on_device,
        "disk": lambda: disk_probes.read_speeds(folder, settings.disk_probe_bytes),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of installed packages (`None` if not installed as a package), and of CUDA."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    import transformers

    found["torch"], found["transformers"] = str(torch.__version__), str(transformers.__version__)
    found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return found | {"cudnn": None if cudnn is None else str(cudnn), "driver": smi().get("driver_version")}


def card() -> dict[str, Any]:
    """Name, memory, multiprocessors and capability of the card, and the driver's data on link and clocks."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "free_bytes": free,
        "total_bytes": total,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "devices": torch.cuda.device_count(),
        "driver": smi(),
        "kernels_for": torch.cuda.get_arch_list(),
    }


@functools.cache
def smi() -> dict[str, str]:
    """Data of `nvidia-smi` on the first card; empty without a card."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said.strip().splitlines()[0].split(",")] if said.strip() else []
    return dict(zip(SMI_FIELDS, values, strict=False))


def lets_go(folder: Path) -> bool | str:
    """Whether the system drops cached pages of a file on request; if not, nothing proves that a request is cold."""
    path = folder / "pages"
    try:
        path.write_bytes(b"\1" * 2**20)
        drop_page_cache([path])
        return resident_pages(path) == 0
    except OSError as error:
        return str(error)
    finally:
        path.unlink(missing_ok=True)
