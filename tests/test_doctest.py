"""The examples in docstrings run as they stand, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

import normops
from normops import activations, calls, functional, nn, testing
from normops.testing import executed, hardware, virtual

explain = importlib.import_module("normops.testing.explain")  # the name is the function's too
predict = importlib.import_module("normops.testing.predict")

COMPILING = (virtual, executed, explain, predict)
"""Modules whose examples compile kernels, which needs a process without the interpreter."""
ROOT = Path(__file__).resolve().parents[1]
NAMES = [info.name for info in pkgutil.walk_packages(normops.__path__, "normops.") if ".kernels" not in info.name]
MODULES = [normops, *map(importlib.import_module, NAMES)]
# Each starts with no names but Python's own, so that it can be copied.
EXAMPLES = {
    test.name: test
    for module in MODULES
    if module not in COMPILING
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
    if test.examples
}
INTERPRETED = ("plans", "Planned", "traffic", "Traffic", "race", "sanitize", "Sanitizer")
"""Names of which an example launches kernels on CPU tensors."""
CONSTANTS: dict[str, ModuleType] = {"__version__": normops, "NAMES": activations, "HARDWARE": hardware}
"""Public names that cannot hold a docstring, and the module whose docstring shows them."""


def own(module: Any) -> list[str]:
    """Public functions and classes that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


PUBLIC = [
    *((normops, name) for name in normops.__all__),
    *((functional, name) for name in own(functional)),
    *((nn, name) for name in own(nn)),
    *((activations, name) for name in activations.__all__),
    *((testing, name) for name in testing.__all__),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name: str) -> None:
    if not calls.INTERPRETED and name.split(".")[-1] in INTERPRETED:
        pytest.skip("counts kernels on CPU tensors: needs TRITON_INTERPRET=1")
    said: list[str] = []
    done = doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert done.attempted > 0 and done.failed == 0, "".join(said)


def test_examples_of_virtual_devices_print_what_they_say() -> None:
    """They compile, which needs a process without the interpreter."""
    names = [module.__name__ for module in COMPILING]
    code = f"""
import doctest, importlib
for name in {names}:
    done = doctest.testmod(importlib.import_module(name), globs={{}})
    assert done.attempted > 5 and done.failed == 0, (name, done)
"""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_a_public_name_has_an_example_that_uses_it(module: ModuleType, name: str) -> None:
    value = CONSTANTS.get(name) or getattr(module, name)
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__  # not one that is inherited
    assert text, "no docstring"
    assert any(name in example.source for example in doctest.DocTestParser().get_examples(text))


def test_public_names_were_found() -> None:
    names = {f"{module.__name__}.{name}" for module, name in PUBLIC}
    expected = {"normops.normalize", "normops.functional.rms_norm", "normops.nn.LayerNorm2d", "normops.testing.race"}
    assert expected <= names, "the modules were read wrongly"
    assert "normops.nn.Linear" not in names, "torch's own names are torch's"
