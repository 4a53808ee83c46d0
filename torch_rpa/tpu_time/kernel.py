"""One dumped kernel, to be timed on any scalars."""

from dataclasses import dataclass
from pathlib import Path

from torch_rpa.tpu_time import listing
from torch_rpa.tpu_time.machine import Machine, Timing
from torch_rpa.tpu_time.program import Program

# Clocks are those that the published peaks follow from. A kernel runs on one of a v5p's two cores, with half its HBM.
CHIPS = {
    "v5e": Timing(1.5e9, 819e9),
    "v5p": Timing(1.75e9, 2765e9 / 2),
    "v6e": Timing(1.755e9, 1640e9),
    "7x": Timing(2.203e9, 3690e9, branch_delay=6),
}
_MOST_CYCLES = 10**9
_DIVISION_STAGES = "DGO-post-reassociate-accumulations.txt", "DGO-post-llo-late-decomposer.txt"
_LISTING = "-packed-bundles-post-ra.txt"


@dataclass(frozen=True)
class ModelledTime:
    """cycles: of the whole run; waited: those of them in which it waits for a DMA; hbm_bytes: read and written."""

    cycles: int
    microseconds: float
    waited: int
    hbm_bytes: int


class Kernel:
    """The largest kernel of a dump.

    Args:
        folder: that libtpu was told to dump to.
        chip: a key of ``CHIPS``, which the dump was made for.

    Raises:
        FileNotFoundError: the folder has no kernel.
        NotImplementedError: no timing is known for the chip, or an operation of the kernel is not.
    """

    def __init__(self, folder: str | Path, chip: str) -> None:
        if chip not in CHIPS:
            raise NotImplementedError(f"time is modelled for {', '.join(CHIPS)}; nothing says how {chip} is timed")
        self._timing = CHIPS[chip]
        path = listing_of_largest_kernel(Path(folder))
        allocations = listing.allocations(other_stage(path, "post-delay-converter.txt"))
        self._program = Program(listing.bundles(path), allocations, self._timing.branch_delay, _divisions(path))

    def run(self, scalars) -> ModelledTime:
        """The time of one call.

        Args:
            scalars: the kernel's scalar operands in order, integer arrays of one dimension.

        Raises:
            RuntimeError: the kernel would stop with an error, wait forever, or run for minutes.
        """
        machine = Machine(self._timing, scalars)
        self._program.run(machine, _MOST_CYCLES)
        return ModelledTime(machine.now, machine.now / self._timing.clock_hz * 1e6, machine.waited, machine.hbm_bytes)


def listing_of_largest_kernel(folder: Path) -> Path:
    """Of a program's listings, those of XLA's own fusions among them, a Pallas kernel's is the longest."""
    found = [f for f in folder.glob(f"*{_LISTING}") if not {"TLP", "schedule"} & set(f.name.split("-"))]
    if not found:
        raise FileNotFoundError(f"no *{_LISTING} in {folder}")
    return max(found, key=lambda f: f.stat().st_size)


def _divisions(path: Path) -> dict[str, str]:
    try:
        return listing.divisions(*(other_stage(path, name) for name in _DIVISION_STAGES))
    except FileNotFoundError:  # of another libtpu: then only a kernel that divides is refused
        return {}


def other_stage(path: Path, name: str) -> Path:
    """The dump of another stage of the kernel whose listing this is; the stages are numbered."""
    kernel, _, _ = path.name.removesuffix(_LISTING).rpartition("-")
    found = next(path.parent.glob(f"{kernel}-[0-9][0-9]-{name}"), None)
    if found is None:
        raise FileNotFoundError(f"no {kernel}-*-{name} in {path.parent}")
    return found
