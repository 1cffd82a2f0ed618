"""The shape of the package: imports point downward, files stay small, importing anybit is cheap."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anybit"

ORDER = [
    {"cli"},
    {"integrations", "report", "serving"},
    {"evaluate", "training"},
    {"engine"},
    {"loading", "saving"},
    {"pipeline"},
    {"independent"},
    {"run"},
    {"decide", "held_out", "learn_block", "tune_block"},
    {"blocks", "job", "sensitivity"},
    {"recipe"},
    {"composition"},
    {"transforms", "allocation"},
    {"calibration"},
    {"methods"},
    {"models"},
    {"checkpoint"},
    {"layers"},
    {"kernels"},
    {"formats"},
    {"cache", "machine"},
    {"errors", "memory"},
]
DEPTH = {room: depth for depth, rooms in enumerate(ORDER) for room in rooms}
OPEN = {"__init__", "__main__", "_native", "recipes"}  # the front door, the compiled module, data


def room(module: str) -> str:
    """`anybit.kernels.planes.op` is in room `kernels`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str, package: str) -> Iterator[str]:
    """Every module of ours that a file imports, at the top or inside a function, absolute or relative."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "anybit" else [module]
        else:
            continue
        yield from (name for name in names if name == "anybit" or name.startswith("anybit."))


def upward(source: str, module: str, package: str) -> list[str]:
    """Imports of `source` that do not point downward."""
    here = room(module)
    targets = {room(name) for name in imports(source, package)} - {here} - OPEN
    if here not in DEPTH:  # the front door may import anything; test_every_room_is_known finds the rest
        return []
    return sorted(t for t in targets if t not in DEPTH or DEPTH[t] <= DEPTH[here])


def modules() -> Iterator[tuple[str, str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("anybit", *path.relative_to(PACKAGE).with_suffix("").parts)
        package = ".".join(parts[:-1])
        yield (".".join(parts) if parts[-1] != "__init__" or len(parts) == 2 else package), package, path


def test_the_rule_itself_catches_what_it_should():
    assert upward("from anybit.methods import x", "anybit.formats.affine", "anybit.formats") == ["methods"]
    assert upward("def f():\n    import anybit.cli.app", "anybit.engine.run", "anybit.engine") == ["cli"]
    assert upward("from anybit import pipeline", "anybit.layers.linear", "anybit.layers") == ["pipeline"]
    assert upward("from ..methods import x", "anybit.kernels.a", "anybit.kernels") == ["methods"]
    assert upward("from anybit.report import page", "anybit.integrations.hf", "anybit.integrations") == ["report"]
    assert upward("from anybit.nowhere import x", "anybit.cli.app", "anybit.cli") == ["nowhere"]
    assert upward("from anybit.errors import x\nfrom .b import y", "anybit.formats.a", "anybit.formats") == []


def test_imports_point_downward():
    found = {name: bad for name, package, path in modules() if (bad := upward(path.read_text(), name, package))}
    assert not found


def test_every_room_is_known():
    rooms = {p.stem for p in PACKAGE.iterdir() if (p.is_dir() or p.suffix == ".py") and not p.name.startswith("__py")}
    assert rooms - set(DEPTH) - OPEN == set()


@pytest.fixture(scope="module")
def check_sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_sizes", ROOT / "scripts" / "check_sizes.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_stay_within_the_size_budget(check_sizes):
    assert check_sizes.violations(ROOT) == []


def test_the_budget_notices_a_long_file(check_sizes, tmp_path):
    (tmp_path / "src" / "anybit").mkdir(parents=True)
    (tmp_path / "src" / "anybit" / "pipeline.py").write_text("x = 1\n" * 151)
    (tmp_path / "src" / "anybit" / "big.py").write_text("x = 1\n" * 601)
    found = check_sizes.violations(tmp_path)
    assert [line.split(":")[0] for line in found] == ["src/anybit/big.py", "src/anybit/pipeline.py", "src"]


def test_importing_anybit_is_cheap():
    code = "import sys, anybit; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
