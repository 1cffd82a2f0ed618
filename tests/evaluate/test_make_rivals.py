"""`make rivals`: each build on its own, each once."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_rivals.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_rivals", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ANYBIT_RIVALS", str(tmp_path / "rivals"))
    return module


def test_one_that_fails_does_not_stop_the_others(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    built: list[str] = []

    def fails(home: Path, run: Any) -> None:
        run(sys.executable, "-S", "-c", "import sys; print('no compiler'); sys.exit(4)")

    def works(home: Path, run: Any) -> None:
        built.append(home.name)

    monkeypatch.setattr(script, "RIVALS", {"first": fails, "second": works})
    assert script.main([]) == 1
    assert built == ["second"]
    said = capsys.readouterr().out
    assert "first: failed" in said
    assert "status 4" in said
    assert "second: ready" in said
    assert "no compiler" in (tmp_path / "rivals" / "first" / "build.log").read_text()
    assert script.main([]) == 1  # the failed one is tried again, the other is not
    assert built == ["second"]


def test_unknown_names_are_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["llama"]) == 2
    assert "known: llama.cpp, openvino, torchao" in capsys.readouterr().err


def test_unpack_takes_one_folder(script: ModuleType, tmp_path: Path) -> None:
    tree = tmp_path / "pkg-1.0" / "vendor" / "engine"
    tree.mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text("project(engine)")
    with tarfile.open(tmp_path / "pkg.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "pkg-1.0", "pkg-1.0")
    script.unpack(tmp_path / "pkg.tar.gz", "vendor/engine", tmp_path / "source")
    assert (tmp_path / "source" / "CMakeLists.txt").read_text() == "project(engine)"
    assert not list(tmp_path.glob("*.partial"))
