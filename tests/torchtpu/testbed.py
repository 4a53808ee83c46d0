"""TorchTPU without a TPU: its device "tpu" is a CPU here, and its programs are compiled for TPUs that are not there.

``make venv-torchtpu`` puts a CPU plugin of PJRT beside TorchTPU, behind ``plugin.cpp``, which it takes for libtpu.
So eager mode, torch.compile, donation and whole models run, with the numbers of XLA on a CPU. Every program is written
down before it is compiled, and ``compiled_for`` has the real libtpu compile it for a chip.

That a TPU's client gets the same programs is assumed. What cannot be seen here: speed on a chip, and several chips.
"""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(sys.prefix, "testbed")
_PLUGIN = FOLDER / "plugin" / "lammps_jax_pjrt_cpu" / "pjrt_c_api_cpu_plugin.so"
_KERNEL = 'custom_call_target="tpu_custom_call"'


def is_installed() -> bool:
    """Whether this environment has TorchTPU, on the test bed."""
    return find_spec("torch_tpu") is not None and _PLUGIN.exists()


def prepare() -> None:
    """Set the environment; before torch is imported."""
    programs = Path(tempfile.mkdtemp(prefix="torch-rpa-testbed-"))
    os.environ.update(
        TPU_LIBRARY_PATH=str(FOLDER / "plugin.so"),
        TORCH_RPA_PLUGIN=str(_PLUGIN),
        TORCH_RPA_PROGRAMS=str(programs),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",  # `start` does it: autoload looks for a TPU on the PCI bus
        # Compiled functions that another process left there are loaded and not compiled; none may be found.
        TORCHINDUCTOR_CACHE_DIR=str(programs / "inductor"),
        TF_CPP_MIN_LOG_LEVEL="3",
    )


def start():
    """Register TorchTPU's device, as ``import torch`` does by itself where there is a TPU: ``torch.device("tpu")``."""
    import torch

    warnings.filterwarnings("ignore", "<TorchTpu")  # tcmalloc is not loaded, an interface is experimental ...
    from torch_tpu import _loader

    _loader._init_device("tpu")
    return torch.device("tpu")


def programs() -> list[Path]:
    """All that was compiled so far, in order."""
    return sorted(Path(os.environ["TORCH_RPA_PROGRAMS"]).glob("*.mlir"))


@dataclass(frozen=True)
class Compiled:
    """A program as libtpu compiles it, as text of optimised HLO."""

    text: str

    @property
    def num_kernels(self) -> int:
        return self.text.count(_KERNEL)

    @property
    def copies(self) -> tuple[str, ...]:
        """Shapes of the arrays that a step of the program copies or transposes. Inside a fusion it is part of another
        step: on 7x a product changes the tiling of what it writes."""
        from torch_rpa import aot

        text = self.text
        for name in set(re.findall(r" fusion\(.*?calls=%([\w.-]+)", text)):
            text = re.sub(rf"^%{re.escape(name)} .*?^}}$", "", text, flags=re.MULTILINE | re.DOTALL)
        return aot.hbm_copies(text)

    @property
    def aliased(self) -> list[str]:
        """Shapes of the arguments whose memory becomes a result's."""
        header, _, entry = self.text.partition("\nENTRY ")
        shapes = {number: shape for shape, number in re.findall(r"= ([^\s{]+)\S* parameter\((\d+)\)", entry)}
        aliases = re.search(r"input_output_alias={(.*?) }", header)
        return [shapes[number] for number in re.findall(r"\}: \((\d+),", aliases[1])] if aliases else []


def compiled_for(chip: str, program: Path) -> Compiled:
    """A kept program, compiled by libtpu for one device of a chip, in a process of its own."""
    import libtpu
    from jaxlib._hlo import HloModule

    from torch_rpa import aot, chips

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "optimized")
        files = program, program.with_suffix(".options"), out
        command = [FOLDER / "compile", libtpu.get_library_path(), _topology(chips.named(chip).topology), *files]
        result = subprocess.run(command, env=aot.child_environment(), capture_output=True, text=True)
        assert result.returncode == 0, f"libtpu refuses {program} for {chip}: {result.stderr[-3000:]}"
        module = HloModule.from_serialized_hlo_module_proto(_first_field(out.read_bytes()))
    return Compiled(module.to_string())


def _topology(name: str) -> str:
    """With three sides, as the plugin wants them: "v6e:2x2x1"."""
    return name if name.count("x", name.index(":")) == 2 else f"{name}x1"


def _first_field(message: bytes) -> bytes:
    """The value of the first field of a serialized protobuf: the module of an HloModuleProtoWithConfig."""
    size, shift, start = 0, 0, 1
    while message[start] >= 128:
        size |= (message[start] - 128) << shift
        shift, start = shift + 7, start + 1
    size |= message[start] << shift
    return message[start + 1 : start + 1 + size]
