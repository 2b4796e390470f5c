"""Device: the limits of a GPU or CPU that a plan is held against."""

from __future__ import annotations

from dataclasses import dataclass

from kvcore.errors import InvalidArgument
from kvcore.planner.names import find

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What a device can hold, read and compute.

    Attributes:
        name: what it is called.
        memory: bytes.
        bandwidth: bytes a second between memory and the processor.
        fp16_flops: dense 16-bit matrix operations a second, summed in float32 (a multiply-add is
            two).
        fp8_flops: the same of 8-bit floats; None: the device has none.
        multiprocessors: streaming multiprocessors, compute units or cores.
        shared_memory: bytes of scratch memory of one of them.
        l2: bytes of the last cache before memory that all of them share.
        link_bandwidth: bytes a second to another device, in one direction.
        host_bandwidth: bytes a second to the host's memory, in one direction.
        source: where the figures are from.
        attention_share: how near decode attention comes to `bandwidth`, 0 to 1; 1 is the roof.
    """

    name: str
    memory: int
    bandwidth: float
    fp16_flops: float
    fp8_flops: float | None
    multiprocessors: int
    shared_memory: int
    l2: int
    link_bandwidth: float
    host_bandwidth: float
    source: str
    attention_share: float = 1.0

    def __post_init__(self) -> None:
        for field in ("memory", "bandwidth", "fp16_flops", "link_bandwidth", "host_bandwidth"):
            if not getattr(self, field) > 0:
                raise InvalidArgument(
                    f"{field}: expected more than 0, got {getattr(self, field)!r}"
                )

    @property
    def ridge(self) -> float:
        """16-bit operations a byte from which on work is bound by arithmetic."""
        return self.fp16_flops / self.bandwidth


def _gpu(
    name: str,
    memory_gib: int,
    gbs: float,
    tflops: tuple[float, float | None],
    chip: tuple[int, int, int],
    links: tuple[float, float],
    source: str,
) -> Device:
    """chip: multiprocessors, KiB of shared memory, MiB of L2; links: GB/s to a peer, to host."""
    fp16, fp8 = tflops
    return Device(
        name,
        memory=memory_gib * GIB,
        bandwidth=gbs * 1e9,
        fp16_flops=fp16 * 1e12,
        fp8_flops=None if fp8 is None else fp8 * 1e12,
        multiprocessors=chip[0],
        shared_memory=chip[1] << 10,
        l2=chip[2] << 20,
        link_bandwidth=links[0] * 1e9,
        host_bandwidth=links[1] * 1e9,
        source=source,
    )


# Matrix rates are dense and with float32 sums: consumer boards do half as many as with float16
# sums, and datasheets often print twice as many, with sparsity.
_DEVICES = (
    _gpu("rtx-3090", 24, 936.2, (71, None), (82, 100, 6), (56.25, 32),
         "NVIDIA Ampere GA102 whitepaper 2.1"),
    _gpu("rtx-4090", 24, 1008, (165.2, 330.3), (128, 100, 72), (32, 32),
         "NVIDIA Ada GPU architecture whitepaper 2.1"),
    _gpu("rtx-5090", 32, 1792, (209.5, 419), (170, 100, 96), (64, 64),
         "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1"),
    _gpu("l40s", 48, 864, (362.05, 733), (142, 100, 96), (32, 32),
         "NVIDIA L40S datasheet"),
    _gpu("a100-40", 40, 1555, (312, None), (108, 164, 40), (300, 32),
         "NVIDIA A100 whitepaper 1.0, SXM4"),
    _gpu("a100-80", 80, 2039, (312, None), (108, 164, 40), (300, 32),
         "NVIDIA A100 80GB datasheet, SXM4"),
    _gpu("h100", 80, 3350, (989.4, 1978.9), (132, 228, 50), (450, 64),
         "NVIDIA H100 datasheet and Hopper whitepaper 1.04, SXM5"),
    _gpu("h100-pcie", 80, 2000, (756, 1513), (114, 228, 50), (300, 64),
         "NVIDIA H100 datasheet and Hopper whitepaper 1.04, PCIe with an NVLink bridge"),
    _gpu("h100-96", 96, 3350, (989.4, 1978.9), (132, 228, 50), (450, 64),
         "NVIDIA H100 SXM5 with 96 GB; memory rate as of the 80 GB board, none is published apart"),
    _gpu("h200", 141, 4800, (989.4, 1978.9), (132, 228, 50), (450, 64),
         "NVIDIA H200 datasheet, SXM"),
    _gpu("b200", 180, 8000, (2250, 4500), (148, 228, 126), (900, 64),
         "NVIDIA DGX B200 datasheet, an eighth of it; chip as its driver says"),
    _gpu("mi300x", 192, 5300, (1307.4, 2614.9), (304, 64, 256), (448, 64),
         "AMD Instinct MI300X datasheet; l2 is the Infinity Cache"),
)  # fmt: skip

#: The built-in devices by name.
DEVICES = {device.name: device for device in _DEVICES}
_ALIASES = {"h100-80": "h100", "h100-sxm": "h100", "a100": "a100-80", "4090": "rtx-4090",
            "3090": "rtx-3090", "5090": "rtx-5090"}  # fmt: skip


def get_device(name: str) -> Device:
    """A built-in device.

    Raises:
        InvalidArgument: there is none of this name; the message has the nearest ones.
    """
    return find(DEVICES, _ALIASES.get(str(name).lower(), name), "device")
