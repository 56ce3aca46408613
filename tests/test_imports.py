"""What importing Roofline costs and offers."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import roofline

TORCH_FREE = (
    "roofline",
    "roofline.budget",
    "roofline.cli",
    "roofline.cli.chat",
    "roofline.config",
    "roofline.engine",
    "roofline.errors",
    "roofline.models.cached",
    "roofline.models.facts",
    "roofline.models.hub",
    "roofline.models.huggingface",
    "roofline.request",
    "roofline.scheduling.scheduler",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_line_editor_costs_nothing_before_a_person_types() -> None:
    code = "import sys, roofline.cli.chat; sys.exit('prompt_toolkit' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_model_that_is_a_path_costs_no_hub() -> None:
    code = "import sys, roofline.models.opening; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_every_public_name_comes_from_the_module_that_defines_it() -> None:
    for name in set(roofline.__all__) - {"__version__"}:
        found = getattr(roofline, name)
        assert found.__name__ == name
        assert found.__module__.startswith("roofline.")
        assert name in dir(roofline)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'roofline' has no attribute 'LMM'"):
        getattr(roofline, "LMM")  # noqa: B009


def test_stub_names_what_the_module_loads() -> None:
    stub = Path(roofline.__file__).with_suffix(".pyi")
    names = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(names) == set(roofline.__all__) - {"__version__"}
    for name, home in names.items():
        assert home == f"{getattr(roofline, name).__module__}.{name}"
        assert importlib.util.find_spec(home.rpartition(".")[0]) is not None
