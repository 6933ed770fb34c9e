"""What is built and shipped: the wheel, the source distribution, and a build without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csdiv",
    "csrc",
    "kernels",
    "bench",
    "studies",
)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of the sources, so that nothing is built in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree)
    return tree


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(source_tree, tmp_path_factory):
    """The sdist, and the wheel that is built from it in isolation: what ``pip install csdiv`` would do.

    Where nvcc is at hand the CUDA kernels are for one architecture, which takes the least time.
    """
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(out), cwd=source_tree, CSDIV_CUDA_ARCHS="90a-real")
    return out


@pytest.mark.slow
def test_wheel_contents(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"csdiv", "csdiv-0.1.0.dist-info"}
    for expected in (
        "csdiv/kernels/__init__.py",
        "csdiv/bench/__main__.py",
        "csdiv/models/__init__.py",
        "csdiv/studies/mnist.toml",
        "csdiv/py.typed",
    ):
        assert expected in names
    assert len([name for name in names if name.startswith("csdiv/_C.")]) == 1


@pytest.mark.slow
def test_sdist_contents(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "README.md", "LICENSE", "kernels/__init__.py"} <= names


@pytest.mark.slow
def test_native_module_needs_no_torch(distributions, tmp_path):
    """The extension of the wheel loads in an interpreter that has never seen torch or numpy."""
    (wheel,) = distributions.glob("*.whl")
    venv.create(tmp_path / "venv")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    code = (
        "import importlib.util, pathlib, sys\n"
        f"path = next(pathlib.Path({str(tmp_path / 'unpacked')!r}).glob('csdiv/_C.*'))\n"
        "spec = importlib.util.spec_from_file_location('csdiv._C', path)\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(module.version, module.cuda_status)"
    )
    printed = run(str(tmp_path / "venv" / "bin" / "python"), "-I", "-c", code, cwd=tmp_path)
    assert printed.startswith(("0.1.0 not built: ", "0.1.0 built with nvcc "))


@pytest.mark.slow
def test_cuda_on_fails_with_the_reason(source_tree, tmp_path):
    arguments = ("-DCSDIV_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}")
    import pybind11

    done = subprocess.run(
        ["cmake", "-S", source_tree, "-B", tmp_path, *arguments, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDAHOSTCXX": "/bin/false"},
    )
    assert done.returncode != 0
    assert "CSDIV_CUDA=on, but CUDA C++ was not built:" in " ".join(done.stderr.split())
