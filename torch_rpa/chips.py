"""Hardware facts of the TPUs that the kernel is compiled for, per TensorCore as a program sees it."""

from dataclasses import dataclass
from math import prod

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Chip:
    """What a program on one device of a chip has to itself.

    Attributes:
        name: as cloud documentation has it, without "TPU".
        device_kinds: what PJRT calls its devices.
        accelerator: what Cloud TPU calls hosts that have it, up to the hyphen.
        topology: the smallest that libtpu compiles for without a TPU, in its own spelling.
        vmem_bytes: vector memory of one core.
        hbm_bytes: memory.
        hbm_bytes_per_s, flops_per_s: published peaks, of bfloat16 products; of the two cores of a v4 or v5p together.
        mxu_dim: rows, and columns, of a matrix unit.
        dma_rows: rows of bfloat16 that a DMA moves at least, and at multiples of.
    """

    name: str
    device_kinds: tuple[str, ...]
    accelerator: str
    topology: str
    vmem_bytes: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float
    mxu_dim: int
    dma_rows: int = 8

    @property
    def vmem_limit_bytes(self) -> int:
        """Of its VMEM what a kernel may take: the compiler keeps a little for itself."""
        return min(self.vmem_bytes * 15 // 16, _MOST_VMEM_BYTES)

    def topology_of(self, num_chips: int) -> str:
        """The smallest slice that has so many chips: "v6e:2x4" for 8 of v6e, "v5p:2x2x2" for 8 of v5p."""
        name, _, sides = self.topology.partition(":")
        sides = [int(side) for side in sides.split("x")]
        while prod(sides) < num_chips:
            shortest = max(i for i, side in enumerate(sides) if side == min(sides))
            sides[shortest] *= 2
        return f"{name}:{'x'.join(map(str, sides))}"


# More would be of no use to the kernel, and XLA keeps what it can of a model's activations in the rest.
_MOST_VMEM_BYTES = 64 * _MIB

# Sources: jax's pallas/mosaic/tpu_info.py (VMEM, matrix units, names), cloud.google.com/tpu/docs (peaks, HBM, hosts).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), "v4", "v4:2x2x1", 16 * _MIB, 32 * _GIB, 1228e9, 275e12, 128),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), "v5litepod", "v5e:2x2", 128 * _MIB, 16 * _GIB, 819e9, 197e12, 128),
        Chip("v5p", ("TPU v5", "TPU v5p"), "v5p", "v5p:2x2x1", 64 * _MIB, 95 * _GIB, 2765e9, 459e12, 128),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), "v6e", "v6e:2x2", 128 * _MIB, 32 * _GIB, 1640e9, 918e12, 256),
        Chip("7x", ("TPU7x",), "tpu7x", "tpu7x:2x2x1", 64 * _MIB, 96 * _GIB, 3690e9, 1154e12, 256, dma_rows=16),
    )
}

# Google's names for a generation, in lower case -> the chip.
NICKNAMES = {"trillium": "v6e", "ironwood": "7x"}

# Where nobody says which chip it is: any but v4.
_UNNAMED = Chip("any", (), "", "", 64 * _MIB, 16 * _GIB, 819e9, 197e12, 128, dma_rows=16)


def named(name: str | None) -> Chip:
    """The facts of the chip that somebody calls so: "v6e", "trillium", or as Cloud TPU calls its hosts, "v5litepod".

    For None, what holds for every chip but v4.

    Raises:
        ValueError: no chip has this name.
    """
    if name is None:
        return _UNNAMED
    known = NICKNAMES.get(name.lower()) or name_on(name.lower())
    if known is None:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, or None if it is not known; got {name!r}")
    return CHIPS[known]


def name_of(device_kind: str) -> str | None:
    """The name of the chip whose devices PJRT calls ``device_kind``; None for one that is not listed here."""
    return next((chip.name for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def name_on(accelerator: str | None) -> str | None:
    """The name of the chip on hosts that Cloud TPU calls so ("v5litepod"); None for one that is not listed here."""
    return next((chip.name for chip in CHIPS.values() if accelerator in (chip.accelerator, chip.name)), None)
