"""The front door: what `import anybit` promises, and checkpoints that load by it or not at all."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import anybit
from tiny_checkpoints import quantize_tiny

LOAD = """
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    print("SUM", float(model(input_ids=torch.arange(4, 24)[None]).logits.double().abs().sum()))
"""
IMPORTS = {
    "anybit first": "import sys, anybit\nfrom transformers import AutoModelForCausalLM\n",
    "transformers first": "import sys\nfrom transformers import AutoModelForCausalLM\nimport anybit\n",
    "our module first": "import sys\nimport anybit.integrations.transformers\n"
    "from transformers import AutoModelForCausalLM\n",
    "anybit after the quantizers": "import sys, transformers.quantizers\nimport anybit\n"
    "from transformers import AutoModelForCausalLM\n",
}


def test_all_is_what_works():
    assert sorted(anybit.__all__) == anybit.__all__
    assert set(anybit.__all__) - {"__version__"} == set(anybit._HOME)
    for name in anybit._HOME:
        function = getattr(anybit, name)
        assert callable(function)
        if name != "evaluate":  # becomes the callable package of that name once one of its modules is imported
            assert function.__module__ == anybit._HOME[name]
        assert inspect.getdoc(function)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        anybit.quantise  # noqa: B018
    assert not hasattr(anybit, "models_of_the_world")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("public"))


def run(code, checkpoint):
    return subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("order", IMPORTS)
def test_plain_transformers_loads_a_checkpoint(checkpoint, order):
    import torch

    done = run(IMPORTS[order] + LOAD, checkpoint)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = float(anybit.load(checkpoint)(input_ids=torch.arange(4, 24)[None]).logits.double().abs().sum())
    assert float(done.stdout.split("SUM")[1]) == pytest.approx(expected, rel=1e-5)


def test_without_anybit_it_stops_instead_of_running_on_noise(checkpoint):
    done = run("import sys\nfrom transformers import AutoModelForCausalLM\n" + LOAD, checkpoint)
    assert done.returncode == 1
    assert "SUM" not in done.stdout
    assert "\nRuntimeError:" in done.stderr
