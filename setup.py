"""Builds csdiv._C with CMake. Everything else stands in pyproject.toml, every compiler flag in CMakeLists.txt.

Environment, all optional:
    CSDIV_CUDA=auto|on|off  CUDA C++ kernels: if they can be built (default), or an error, or not at all
    CSDIV_CUDA_ARCHS=80;90a  GPU architectures
    CSDIV_SANITIZE=1        address and undefined-behaviour sanitizers
    CMAKE_ARGS="..."        passed to CMake as it is
    MAX_JOBS=N              parallel compilations
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        output = (Path.cwd() / self.get_ext_fullpath(extension.name)).parent.resolve()
        build = (Path(self.build_temp) / extension.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        for stale in output.glob("_C.*"):  # would be packed into the wheel
            stale.unlink()
        arguments = [
            "-G=Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCSDIV_OUTPUT={output}",
            f"-DCSDIV_VERSION={self.distribution.get_version()}",
            f"-DCSDIV_CUDA={os.environ.get('CSDIV_CUDA', 'auto').upper()}",
            f"-DCSDIV_SANITIZE={os.environ.get('CSDIV_SANITIZE', '0')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if "CSDIV_CUDA_ARCHS" in os.environ:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['CSDIV_CUDA_ARCHS']}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # --fresh: the cache of an earlier isolated build points to tools that are gone.
        subprocess.run(["cmake", "--fresh", "-S", ROOT, "-B", build, *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
        subprocess.run(["cmake", "--install", build], check=True)


setup(ext_modules=[Extension("csdiv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
