"""Every family: quantize, load both ways with the same logits, generate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import anybit
from anybit.engine.generate import generate
from tiny_models import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_load_generate(family, tmp_path, text_file):
    save_tiny(family, tmp_path / "float")
    out = tmp_path / "out"
    summary = anybit.quantize(
        str(tmp_path / "float"), recipe="gptq-w4", out=str(out), calibration=text_file, samples=4, seq_len=32,
        overrides=["weights.bits=8", "weights.group_size=16"], allow_unseen_experts=True,
    )  # fmt: skip
    ids = torch.randint(4, 200, (1, 20), generator=torch.Generator().manual_seed(1))
    checked = anybit.load(out)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    with torch.inference_mode():
        logits = checked(input_ids=ids).logits
        assert torch.equal(logits, plain(input_ids=ids).logits)
        expected = reference(input_ids=ids).logits
    # 8 bits: every position close to the float model, save where a router of experts flips, but not equal to it, which
    # would mean that nothing was quantized.
    difference = (logits - expected).abs().amax(-1).median() / expected.std()
    assert 1e-5 < float(difference) < 0.15
    result = generate(checked, AutoTokenizer.from_pretrained(out), "The quick", max_new_tokens=8)
    assert 1 <= result.tokens <= 8
    assert summary["layers"] == len(list((out / "ledger.json").read_text().split('"planned"'))) - 1
