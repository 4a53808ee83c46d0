"""Build torch_rpa: pure Python, and the native extension `torch_rpa._C` where torch and a compiler are there.

The extension is optional: when it cannot be built, one message says why and the package is installed without
it. Installers show no message of a build that succeeds, so the package carries the reason too, for the warning at the
first use and for `python -m torch_rpa.info`. TORCH_RPA_REQUIRE_NATIVE=1 makes it an error. All metadata is in
pyproject.toml.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "torch_rpa._C"
REASON_FILE = "torch_rpa/no_native.txt"  # why there is no extension; torch_rpa/native.py reads it
SOURCES = [
    "csrc_stub/module.cpp",
    "csrc_stub/attention_op.cpp",
    "csrc_stub/run.cpp",
    "csrc_stub/schedule.cpp",
    "csrc_stub/kernel.cpp",
    "csrc_stub/attention.cpp",
    "csrc_stub/write_pages.cpp",
    "csrc_stub/linear_op.cpp",
    "csrc_stub/linear.cpp",
]
# These are compiled again for each of the capabilities; which one runs is chosen at run time (csrc_stub/kernel.cpp).
# The names and macros are those of ATen, whose vector types depend on them.
KERNEL_SOURCES = ["csrc_stub/attention.cpp", "csrc_stub/linear.cpp"]
CPU_CAPABILITIES = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        "-mprefer-vector-width=512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ],
}
# Without OpenMP at::parallel_for would be a serial loop; in use, torch and the extension share one libgomp.
# The C++ standard is the one that torch's build_ext adds, which its headers need: 17 for torch 2.9, 20 for 2.14.
# If maths functions had to set errno, std::lrint would be a library call for each element.
# A division or comparison that could trap keeps the compiler from making vectors of a loop.
COMPILE_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-unknown-pragmas",
]
LINK_FLAGS = ["-fopenmp"]


class OptionalBuildExt(build_ext):
    """Has torch build the extension, and goes on without it if that fails.

    torch is imported only here, not for the metadata that installers ask for before they build.
    """

    def run(self):
        self.remove_earlier(REASON_FILE)
        try:
            self.build_with_torch()
        except Exception as error:  # a compiler may be absent, too old, without headers, killed ...
            self.remove_earlier(self.get_ext_filename(NAME))  # lest it is packaged or imported as if it were new
            self.extensions = []  # nothing to copy or to package
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if os.environ.get("TORCH_RPA_REQUIRE_NATIVE") == "1":
                sys.exit(f"error: the native extension of torch_rpa cannot be built: {reason}")
            report_pure_python(reason)
            self.keep(reason)

    def build_with_torch(self):
        """Build into the folders that this command was given; raises whatever goes wrong."""
        cpp_extension, torch_version = import_torch()
        check_toolchain(cpp_extension.get_cxx_compiler())
        self.distribution.ext_modules = [
            cpp_extension.CppExtension(
                NAME,
                SOURCES,
                extra_compile_args=[*COMPILE_FLAGS, *capability_flags("DEFAULT")],
                extra_link_args=LINK_FLAGS,
            )
        ]
        builder = build_for_each_capability(cpp_extension.BuildExtension)(self.distribution)
        builder.build_lib = self.build_lib
        builder.inplace = self.inplace
        builder.editable_mode = self.editable_mode
        # Objects and libraries of an earlier build may be of another torch, which file times do not tell.
        builder.build_temp = str(Path(self.build_temp, f"torch-{torch_version}"))
        builder.force = True
        builder.ensure_finalized()
        builder.run()

    def folders(self):
        """Where the package's files go: to be packaged, and the source tree where it is to be imported from there."""
        return [Path(self.build_lib), *[Path()] * bool(self.editable_mode or self.inplace)]

    def remove_earlier(self, file_name):
        """Take away what an earlier build left."""
        for folder in self.folders():
            (folder / file_name).unlink(missing_ok=True)

    def keep(self, reason):
        for folder in self.folders():
            (folder / REASON_FILE).parent.mkdir(parents=True, exist_ok=True)
            (folder / REASON_FILE).write_text(reason + "\n")


def capabilities():
    """The vector units to compile for, beside every processor's own."""
    return list(CPU_CAPABILITIES) if platform.machine().lower() in ("x86_64", "amd64") else []


def capability_flags(name):
    flags = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *CPU_CAPABILITIES.get(name, [])]
    return [*flags, "-DTORCH_RPA_X86"] if capabilities() else flags


def build_for_each_capability(build_extension_class):
    """torch's BuildExtension, which also links the kernels' objects for each vector unit."""

    class BuildForEachCapability(build_extension_class):
        def build_extension(self, ext):
            with ThreadPoolExecutor() as pool:
                objects = pool.map(lambda name: self.compile_kernels(ext, name), capabilities())
                # They come last, so that of functions in several objects the linker takes the baseline's.
                ext.extra_objects = [path for paths in objects for path in paths]
            super().build_extension(ext)

        def compile_kernels(self, ext, name):
            return self.compiler.compile(
                KERNEL_SOURCES,
                output_dir=str(Path(self.build_temp, name)),
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMPILE_FLAGS, *capability_flags(name)],
                depends=ext.depends,
            )

    return BuildForEachCapability


def import_torch():
    """torch.utils.cpp_extension and torch's version, from the environment that this package goes into.

    pip builds in an isolated environment that has only what pyproject.toml asks for. torch is not in that
    list, as pip would download gigabytes of it again for each build; the interpreter's own site-packages,
    which isolation hides, go to the end of the path instead.
    """
    paths = sysconfig.get_paths()
    for key in ("purelib", "platlib"):
        if paths[key] not in sys.path:
            sys.path.append(paths[key])
    import torch
    from torch.utils import cpp_extension

    return cpp_extension, torch.__version__


def check_toolchain(compiler_command):
    """Raise FileNotFoundError if the compiler or Python's headers are missing (the usual causes)."""
    compiler = shlex.split(compiler_command)[0]
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no C++ compiler ({compiler} not found)")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise FileNotFoundError("Python.h not found (on Debian and Ubuntu it is in python3-dev)")


def report_pure_python(reason):
    """Say that the package is built without the extension, why, and what to do about it."""
    print(
        "torch_rpa: building WITHOUT the native extension; the package works in pure Python, slower on CPU\n"
        f"  reason: {reason}\n"
        "  to build it: install torch, setuptools, a C++ compiler and Python's headers, then\n"
        "    `pip install --no-build-isolation .`, or the same with `uv pip`, which hides torch from isolated builds\n"
        "  (TORCH_RPA_REQUIRE_NATIVE=1 makes this an error)",
        file=sys.stderr,
        flush=True,
    )


setup(ext_modules=[Extension(NAME, SOURCES)], cmdclass={"build_ext": OptionalBuildExt})
