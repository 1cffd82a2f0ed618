"""Documents that are code: the format's reader runs, examples call what exists, commands and links are real."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import anybit
from anybit.cli.app import app
from anybit.formats.terms import dense, load_terms
from tiny_checkpoints import quantize_tiny

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.is_file()]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = typer.main.get_command(app).commands


def blocks(path: Path, language: str) -> list[str]:
    """Code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "case",
    [
        ("llama", {"overrides": ["weights.group_size=48"]}),
        ("llama", {"overrides": ["weights.symmetric=true", "weights.bits=3"], "config": {"tie_word_embeddings": True}}),
        ("gpt2", {"recipe": "gptq-w4"}),
    ],
    ids=["uneven groups", "symmetric", "conv1d"],
)
def test_the_reader_of_the_format_reads_every_layer(tmp_path, case):
    family, options = case
    directory = quantize_tiny(family, tmp_path, **options)
    reader: dict = {}
    (source,) = [text for text in blocks(ROOT / "docs" / "FORMAT.md", "python") if "def read_affine" in text]
    exec(compile(source, "FORMAT.md", "exec"), reader)
    modules = dict(anybit.load(directory).named_modules())
    forms = json.loads((directory / "config.json").read_text())["quantization_config"]["layers"]
    assert len(forms) > 4
    for name, form in forms.items():
        own = dense(load_terms(form, {key: p.data for key, p in modules[name].named_parameters(recurse=False)}))
        found = reader["read_affine"](directory, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, own), name


def test_the_example_in_the_format_is_what_is_written(tmp_path):
    written = json.loads((quantize_tiny("llama", tmp_path) / "config.json").read_text())["quantization_config"]
    shown = json.loads(blocks(ROOT / "docs" / "FORMAT.md", "json")[0])
    assert shown.keys() == written.keys()
    (shown_layer,), written_layer = shown["layers"].values(), next(iter(written["layers"].values()))
    assert shown_layer.keys() == written_layer.keys()
    assert shown_layer["terms"][0].keys() == written_layer["terms"][0].keys()


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every `anybit.NAME(...)` of a program."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="anybit"), attr=name)):
                yield name, node


def check_calls(source: str) -> int:
    """Binds each call to the real signature; returns how many there were."""
    found = list(calls(source))
    for name, call in found:
        keywords = {word.arg: None for word in call.keywords if word.arg}
        inspect.signature(getattr(anybit, name)).bind(*call.args, **keywords)
    return len(found)


def test_the_check_of_calls_catches_what_it_should():
    with pytest.raises(TypeError, match="recipes"):
        check_calls("import anybit\nanybit.quantize('m', recipe='x', recipes='x', out='y')")
    with pytest.raises(AttributeError):
        check_calls("anybit.quantise('m')")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_call_what_exists_and_say_how_to_run_them(path):
    source = path.read_text()
    compile(source, path.name, "exec")
    assert check_calls(source) >= 1
    head = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{path.name}" in head
    assert 'if __name__ == "__main__":' in source


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_in_pages_calls_what_exists(path):
    for text in blocks(path, "python"):
        compile(text, path.name, "exec")
        check_calls(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s#]+)", path.read_text())
    missing = [t for t in targets if not re.match(r"[a-z]+:", t) and not (path.parent / t).exists()]
    assert not missing


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `anybit ...` line of a shell block, without comments."""
    for line in text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["anybit"]:
            yield words[1:]


def wrong(words: list[str]) -> str:
    """What is wrong with a command line, or nothing."""
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    command = COMMANDS[words[0]]
    if hasattr(command, "commands"):  # a group: `anybit schedule tune`
        if words[1:2] == [] or words[1] not in command.commands:
            return f"no command {' '.join(words[:2])}"
        command = command.commands[words[1]]
    known = {option for param in command.params for option in param.opts} | {"--help", "-h"}
    flags = [word.split("=")[0] for word in words[1:] if word.startswith("-")]
    unknown = [flag for flag in flags if flag not in known]
    return f"{words[0]} has no {unknown[0]}" if unknown else ""


def test_the_check_of_commands_catches_what_it_should():
    assert list(commands("anybit eval x  # anybit nothing\nmake demo")) == [["eval", "x"]]
    assert wrong(["evaluate", "x"]) == "no command evaluate"
    assert wrong(["schedule", "tuna", "x"]) == "no command schedule tuna"
    assert wrong(["schedule", "tune", "x", "--task", "extract"]) == ""
    assert wrong(["eval", "x", "--bogus=3"]) == "eval has no --bogus"
    assert wrong(["eval", "x", "--text", "y"]) == ""


def test_commands_in_the_readme_exist():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not written yet")
    found = [words for text in blocks(readme, "sh") for words in commands(text)]
    assert len(found) >= 3
    assert [wrong(words) for words in found] == [""] * len(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_running_text_exist(path):
    quoted = re.findall(r"`(anybit [a-z][^`\n]*)`", path.read_text())
    found = [shlex.split(text)[1:] for text in quoted]
    assert [problem for words in found if (problem := wrong(words))] == []


def test_make_targets_in_the_readme_exist():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not written yet")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {match for text in blocks(readme, "sh") for match in re.findall(r"^make ([a-z]+)", text, re.M)}
    assert used
    assert used <= targets
