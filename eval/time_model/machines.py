"""Machines by their speeds, with the source of each figure."""

from __future__ import annotations

from dataclasses import dataclass

from hf_contiguouskv.planning.machine import ACCELERATORS, CALL_S, OPERATION_S, SHARE_REACHED


@dataclass(frozen=True)
class Disk:
    """What a request reads from.

    Attributes:
        name: for tables.
        bytes_s: bytes per second of long reads, several at once.
        reads_s: reads of 4 KiB per second, as many at once as there are reader threads (8).
        latency_s: seconds of one short read by itself.
        source: of these figures.
    """

    name: str
    bytes_s: float
    reads_s: float
    latency_s: float
    source: str


@dataclass(frozen=True)
class Host:
    """The processor that runs Python, and its memory.

    Attributes:
        name: for tables.
        call_s: seconds of one call of a Python or C function.
        operation_s: seconds that torch needs to hand out one operation, without launching a kernel.
        memory_s: bytes per second of torch's copies in host memory, on all its threads, read and written counted.
        f32_s, f16_s, i8_s: multiplications and additions per second, by precision; 0: no model runs on it.
        threads: that share the work of the model and of readers.
        source: of these figures.
    """

    name: str
    call_s: float
    operation_s: float
    memory_s: float
    f32_s: float
    f16_s: float
    i8_s: float
    threads: int
    source: str


@dataclass(frozen=True)
class Gpu:
    """An accelerator and the bus to it.

    Attributes:
        name: for tables.
        memory_s: bytes per second of its memory.
        f32_s, f16_s, i8_s: multiplications and additions per second, by precision, dense.
        bus_s: bytes per second from pinned host memory.
        pageable_s: the same from other host memory.
        copy_s: seconds until a copy has begun.
        launch_s: seconds of the host for one launch.
        kernel_s: seconds that a kernel takes at least.
        wait_s: seconds from the end of what the host waits for until it goes on.
        share: of memory and arithmetic speed that ordinary kernels reach.
        source: of these figures.
    """

    name: str
    memory_s: float
    f32_s: float
    f16_s: float
    i8_s: float
    bus_s: float
    pageable_s: float
    copy_s: float
    launch_s: float
    kernel_s: float
    wait_s: float
    share: float
    source: str


@dataclass(frozen=True)
class Machine:
    """A computer. `gpu=None`: the model runs on the host."""

    name: str
    host: Host
    disk: Disk
    gpu: Gpu | None
    hash_s: float = 8e9
    """Bytes per second of a checksum, by one thread (xxh3; measured here)."""


# -- disks ------------------------------------------------------------------------------------------------------------

SAMSUNG_990_PRO = Disk(
    "990 Pro",
    bytes_s=7.45e9,
    reads_s=160e3,
    latency_s=50e-6,
    source="data sheet: 7.45 GB/s; a published review: 82 MB/s of single 4 KiB reads, so 50 us each, times 8 threads",
)
DATACENTRE_NVME = Disk(
    "datacentre NVMe",
    bytes_s=6.8e9,
    reads_s=100e3,
    latency_s=80e-6,
    source="data sheets of PCIe 4 drives: 6.8 to 6.9 GB/s, 80 us",
)
COLAB_DISK = Disk("Colab's disk", bytes_s=0.2e9, reads_s=8e3, latency_s=1e-3, source="assumed (a network disk)")
OUR_DISK = Disk(
    "virtual disk",
    bytes_s=1.7e9,
    reads_s=94e3,
    latency_s=85e-6,
    source="measured here: 1.5 to 2.0 GB/s; 4 KiB reads 85 us alone, so 94,000 a second by 8 threads",
)

# -- processors -------------------------------------------------------------------------------------------------------

EPYC = Host(
    "EPYC (Zen 4), 2 cores",
    call_s=CALL_S,
    operation_s=OPERATION_S,
    memory_s=17.7e9,
    f32_s=150e9,
    f16_s=500e9,
    i8_s=1000e9,
    threads=2,
    source="calls, operations, memory: measured here (--probe); arithmetic: assumed, three quarters of AVX-512's best",
)
SERVER = Host(
    "server",
    call_s=CALL_S,
    operation_s=OPERATION_S,
    memory_s=30e9,
    f32_s=100e9,
    f16_s=100e9,
    i8_s=100e9,
    threads=16,
    source="calls and operations: as measured on our EPYC (where they compute, here they allocate); memory: assumed",
)
DESKTOP = Host(
    "desktop",
    call_s=0.32e-6,
    operation_s=1.8e-6,
    memory_s=30e9,
    f32_s=100e9,
    f16_s=100e9,
    i8_s=100e9,
    threads=16,
    source="assumed: 1.6 times as fast as the server",
)
COLAB_HOST = Host(
    "Colab's Xeon, 2 threads",
    call_s=0.9e-6,
    operation_s=4.9e-6,
    memory_s=10e9,
    f32_s=50e9,
    f16_s=50e9,
    i8_s=50e9,
    threads=2,
    source="assumed: 1.7 times the server's times",
)

# -- accelerators -----------------------------------------------------------------------------------------------------

_GPU = "memory and arithmetic: data sheet; bus: assumed 80% of its data sheet's; launches, latencies, share: assumed"


def _gpu(name: str, i8_s: float, **assumed: float) -> Gpu:
    """A card of the planner's, with what only this model of time asks of it."""
    card = ACCELERATORS[name]
    return Gpu(
        card.name,
        memory_s=card.memory_s,
        f32_s=card.f32_s,
        f16_s=card.f16_s,
        i8_s=i8_s,
        bus_s=card.bus_s,
        pageable_s=card.pageable_s,
        launch_s=card.launch_s,
        source=_GPU,
        **({"copy_s": 10e-6, "kernel_s": 2e-6, "wait_s": 10e-6, "share": SHARE_REACHED} | assumed),
    )


A800 = _gpu("a800", i8_s=624e12)
H100 = _gpu("h100", i8_s=1979e12)
RTX_4090 = _gpu("rtx4090", i8_s=660e12, share=0.8)
T4 = _gpu("t4", i8_s=130e12, copy_s=15e-6, kernel_s=3e-6, wait_s=20e-6, share=0.7)

MACHINES = (
    Machine("A800 80GB, 990 Pro", SERVER, SAMSUNG_990_PRO, A800),
    Machine("H100 80GB, datacentre NVMe", SERVER, DATACENTRE_NVME, H100),
    Machine("RTX 4090, 990 Pro", DESKTOP, SAMSUNG_990_PRO, RTX_4090),
    Machine("Colab T4", COLAB_HOST, COLAB_DISK, T4),
)
OURS_CPU = Machine("EPYC (Zen 4), no GPU", EPYC, OUR_DISK, None)
