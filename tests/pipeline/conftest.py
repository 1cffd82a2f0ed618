"""Shared by the pipeline tests: a tiny float model and enough text to calibrate it."""

from __future__ import annotations

import pytest

from tiny_models import save_tiny

SENTENCE = "The quick brown fox jumps over the lazy dog, turns around and asks for the way home. 0123456789 "


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Varied bytes, about 5,000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(SENTENCE[i % 7 :] for i in range(60)))
    return str(path)


@pytest.fixture(scope="session")
def float_dir(tmp_path_factory):
    """A tiny Llama on disk; tests must not change it."""
    directory = tmp_path_factory.mktemp("model") / "float"
    save_tiny("llama", directory)
    return directory
