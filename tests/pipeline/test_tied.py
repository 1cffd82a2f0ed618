"""A tied model whose shared table stays in float."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import anybit
from tiny_models import save_tiny


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_canary_of_a_float_tied_table_is_what_the_model_answers(family, tmp_path, text_file):
    options = {"tie_word_embeddings": True} if family == "llama" else {}
    save_tiny(family, tmp_path / "float", **options)
    anybit.quantize(
        str(tmp_path / "float"), recipe="rtn-w4", out=str(tmp_path / "out"), calibration=text_file, samples=2,
        seq_len=32, overrides=["embeddings.name=float"],
    )  # fmt: skip
    canary = json.loads((tmp_path / "out" / "canary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([canary["ids"]])).logits[0, -1]
    assert canary["spread"] == pytest.approx(float(logits.std()), rel=1e-4)
    assert torch.allclose(logits[canary["top_ids"]], torch.tensor(canary["top_logits"]), atol=1e-4)
    anybit.load(tmp_path / "out")
