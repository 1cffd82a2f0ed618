"""Every command explains itself, cheaply, and the generated pages say the same."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from anybit.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
CONTRACT = ["demo", "quantize", "recipes", "inspect", "eval", "generate", "chat", "serve", "schedule"]
CONTRACT += ["export", "import", "plan", "bench", "doctor"]


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_are_those_of_the_contract():
    assert list(dict.fromkeys(name.split()[0] for name, _, _ in COMMANDS)) == CONTRACT


@pytest.mark.parametrize(("name", "example"), [(name, example) for name, _, example in COMMANDS])
def test_help_ends_with_an_example_whose_flags_exist(anybit, name, example):
    done = anybit(*name.split(), "--help")
    assert done.code == 0
    assert done.err == ""
    options, _, tail = done.out.partition("Example:")
    assert tail.strip() == example
    words = shlex.split(example)
    assert words[: len(name.split()) + 1] == ["anybit", *name.split()]
    assert all(word in options for word in words if word.startswith("--"))


def test_a_bare_call_shows_all_commands(anybit):
    done = anybit()
    assert done.code == 0
    assert all(f"\n  {name} " in done.out for name in CONTRACT)


def test_help_and_inspect_import_nothing_heavy(checkpoint):
    code = (
        "import sys; from anybit.cli import main; main(['quantize', '--help']); main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'plotly'} & set(sys.modules)), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "inspect", str(checkpoint), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


def test_generated_pages_are_up_to_date(make_docs):
    for path, text in make_docs.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run python scripts/make_docs.py"


def test_every_command_is_in_the_reference(make_docs):
    assert all(f"## anybit {name}\n" in make_docs.cli_page() for name, _, _ in COMMANDS)


def test_pages_do_not_depend_on_the_terminal(make_docs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    narrow = make_docs.cli_page()
    monkeypatch.setenv("COLUMNS", "300")
    assert make_docs.cli_page() == narrow


def test_check_reports_a_stale_page_and_leaves_it(make_docs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    assert make_docs.main(["--check"]) == 1
    assert "docs/cli.md is stale" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0
    (tmp_path / "docs" / "methods.md").write_text("old")
    assert make_docs.main(["--check"]) == 1
    assert (tmp_path / "docs" / "methods.md").read_text() == "old"
