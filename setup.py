"""Builds csdiv._C with CMake. Everything else stands in pyproject.toml, every compiler flag in CMakeLists.txt.

Environment, all optional:
    CSDIV_CUDA=auto|on|off  CUDA C++ kernels: if they can be built (default), or an error, or not at all
    CSDIV_CUDA_ARCHS="80;90a"  GPU architectures, 75 and later, or all-major; by default those of the GPUs present
    CUDACXX, CUDAHOSTCXX    nvcc, and the C++ compiler that it calls
    CSDIV_SANITIZE=1        address and undefined-behaviour sanitizers
    CMAKE_ARGS="..."        passed to CMake as it is
    MAX_JOBS=N              parallel compilations
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wheel_environment() -> dict[str, str]:
    """What makes nvcc of the wheels cuda-toolkit[nvcc,crt,nvvm,cudart] work where no toolkit is installed."""
    if "CUDACXX" in os.environ or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ or shutil.which("nvcc"):
        return {}
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return {}
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))  # also where the build is isolated
    if not wheels:
        return {}
    libraries = wheels[-1].parents[1] / "lib"  # nvcc looks in lib64
    return {
        "CUDACXX": str(wheels[-1]),
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -L{libraries}".strip(),
        "LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LIBRARY_PATH", "")])),
    }


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
        environment = os.environ | wheel_environment()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # --fresh: the cache of an earlier isolated build points to tools that are gone.
        subprocess.run(["cmake", "--fresh", "-S", ROOT, "-B", build, *arguments], check=True, env=environment)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True, env=environment)
        subprocess.run(["cmake", "--install", build], check=True)


setup(ext_modules=[Extension("csdiv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
