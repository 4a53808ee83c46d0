"""A C++ program calls the native kernel through the dispatcher, without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_native import needs_native
from torch.utils import cpp_extension

from torch_rpa import native

SOURCE = Path(__file__).parent / "cpp" / "decode.cpp"


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_cpp_program_decodes_through_the_dispatcher(tmp_path):
    (library,) = Path(native.__file__).parent.glob("_C.*.so")
    folder = Path(torch.__file__).parent / "lib"
    program = tmp_path / "decode"
    command = ["g++", "-std=c++20", "-O1", str(SOURCE), "-o", str(program)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-L{folder}", "-Wl,--no-as-needed"]
    command += ["-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{folder}"]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program), str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "out 3.000, written 6.0\n"
