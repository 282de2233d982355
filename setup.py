"""Builds csrc/ with CMake and ninja and places the two shared objects inside the package.

Never looks at the host's CPU: every instruction set is compiled, the one to use is chosen at import.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "torch_moelora"
OPERATORS = "libmoelora_ops.so"


class CMakeBuild(build_ext):
    """Runs `cmake -G Ninja` on the repository; CMAKE_ARGS and MAX_JOBS are honoured."""

    def build_extension(self, ext):
        import pybind11
        import torch

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp: an editable install makes a fresh one each time, and would compile everything.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{'debug' if self.debug else 'release'}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-UMOELORA_*",  # options of an earlier build
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOELORA_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DMOELORA_OUTPUT_DIR={package}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        # cmake and ninja stand beside this Python, whether or not its environment is activated.
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
        environ = os.environ | {"PATH": path}
        subprocess.run(configure, check=True, env=environ)
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True, env=environ)

    def copy_extensions_to_source(self):
        """Editable installs: the operators' library goes beside the module, into the source tree."""
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / PACKAGE / OPERATORS), str(ROOT / PACKAGE / OPERATORS))

    def get_outputs(self):
        return [*super().get_outputs(), str(Path(self.build_lib) / PACKAGE / OPERATORS)]


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
