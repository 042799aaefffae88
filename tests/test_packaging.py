"""The folder kernels/ is the package normops.kernels, in a checkout and in a wheel, and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )


def succeed(*command: str | Path, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("building a wheel without isolation needs setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"building a wheel needs setuptools >= 77, found {version}")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: what an earlier build left in the checkout does not leak into the wheel
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    succeed("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_import_from_the_checkout_binds_no_top_level_kernels() -> None:
    code = "import sys, normops.kernels.stream; print([m for m in sys.modules if m.split('.')[0] == 'kernels'])"
    assert succeed("-c", code, cwd=ROOT).strip() == "[]"


@pytest.mark.parametrize(("code", "error"), [
    ("import kernels.stream", "ModuleNotFoundError: No module named 'kernels.stream'"),
    ("from kernels import get_kernel", "ImportError: cannot import name 'get_kernel' from 'kernels'"),
    ("import kernels; kernels.__version__", "AttributeError: this folder is the package normops.kernels"),
])  # fmt: skip
def test_kernels_is_nothing_at_the_top_level(code: str, error: str) -> None:
    """Transformers asks whether there is a package `kernels`, and which version: it must be able to ask."""
    done = run("-c", code, cwd=ROOT)
    assert done.returncode != 0 and error in done.stderr


def test_version_of_the_wheel_is_the_version_of_the_package(wheel: Path) -> None:
    version = succeed("-c", "import normops; print(normops.__version__)", cwd=ROOT).strip()
    assert wheel.name.startswith(f"normops-{version}-")


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"normops/__init__.py", "normops/py.typed", "normops/kernels/stream.py"} <= set(names)
    assert {f"normops/kernels/{f.name}" for f in (ROOT / "kernels").glob("*.py")} <= set(names)
    assert {f"normops/testing/{f.name}" for f in (ROOT / "normops/testing").glob("*.py")} <= set(names)
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"normops"}
    assert any(n.endswith("/LICENSE") for n in names)


def test_wheel_works_beside_a_distribution_named_kernels(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    succeed("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=elsewhere)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("OTHER = True\n")
    code = (
        "import kernels, normops, normops.kernels.stream as f\n"
        "assert kernels.OTHER\n"
        "print(normops.__file__); print(f.__file__)"
    )
    for file in succeed("-c", code, cwd=elsewhere, PYTHONPATH=str(site)).splitlines():
        assert Path(file).is_relative_to(site)
