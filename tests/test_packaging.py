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

import numpy
import pytest
import torch

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
            shutil.copytree(source, tree / name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(source, tree)
    return tree


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plain_checkout_works_on_the_path(tmp_path):
    """Without an install, a native module and .pth files: links in csdiv/ lead to the folders beside it."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("csdiv", "kernels", "bench", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore, symlinks=True)
    packages = {str(Path(module.__file__).parents[1]) for module in (torch, numpy)}
    code = (
        "import csdiv, importlib.util, torch\n"
        "import csdiv.bench.cases, csdiv.kernels.configurations, csdiv.studies.config\n"
        "if importlib.util.find_spec('triton'): import csdiv.backends.triton\n"
        "p = csdiv.GaussianMixture(torch.zeros(2, 3), torch.ones(2, 3))\n"
        "print(csdiv.__path__[0], csdiv.backend_status()['cpu'].available)\n"
        "print(csdiv.cs_divergence(p, p, backend='reference').item())"
    )
    path = os.pathsep.join([str(tmp_path), *packages])
    assert run(sys.executable, "-S", "-c", code, cwd=tmp_path.parent, PYTHONPATH=path).split() == [
        str(tmp_path / "csdiv"),
        "False",
        "0.0",
    ]


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
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csdiv").rglob("*.py")}
    for folder in ("kernels", "bench", "studies"):  # once each, though csdiv/ has links to them
        found = (ROOT / folder).glob("*.*")
        modules |= {f"csdiv/{folder}/{path.name}" for path in found if path.suffix in (".py", ".toml")}
    native = [name for name in names if name.startswith("csdiv/_C.")]
    assert len(native) == 1
    assert sorted(name for name in names if name.startswith("csdiv/")) == sorted(modules | {"csdiv/py.typed", *native})


@pytest.mark.slow
def test_sdist_contents(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed = {"CMakeLists.txt", "setup.py", "README.md", "LICENSE", "kernels/__init__.py", "studies/mnist.toml"}
    assert sources | needed <= names
    assert not [name for name in names if name.startswith(("csdiv/kernels", "csdiv/bench", "csdiv/studies"))]


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
