"""`evaluate` end to end on tiny models on disk: keys of the command line contract, and their agreement."""

import json

import pytest
import torch

import anybit.evaluate
from anybit.errors import InputError
from anybit.evaluate.run import compare_with_baseline, evaluate
from anybit.loading import is_anybit_directory, load_any
from tiny_models import save_tiny, tiny, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, é and 日本. " * 6


@pytest.fixture
def model(tmp_path):
    save_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def test_alone(model, text):
    result = evaluate(model, text=text, ctx=32, max_tokens=128)
    assert result["tokens"] == 4 * 31
    assert (result["ctx"], result["windows"], result["data"]["shape"]) == (32, 4, [4, 32])
    assert result["perplexity"] > 1
    assert result["stderr"] > 0
    assert not any(key.startswith(("baseline", "kl")) for key in result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert anybit.evaluate(model, text=text, ctx=32, max_tokens=128)["perplexity"] == result["perplexity"]


def test_beside_itself(model, text):
    result = evaluate(model, text=text, baseline=model, ctx=32)
    assert result["baseline_perplexity"] == result["perplexity"]
    assert (result["kl_mean"], result["kl_p99"], result["kl_max"], result["top1_agreement"]) == (0, 0, 0, 1)
    assert result["kl_noise_floor"] > 0
    assert (result["perplexity_ratio_low"], result["perplexity_ratio"], result["perplexity_ratio_high"]) == (1, 1, 1)
    assert result["perplexity"] == pytest.approx(evaluate(model, text=text, ctx=32)["perplexity"], rel=1e-6)


def test_a_damaged_copy_is_worse_than_noise(text):
    baseline, damaged = tiny("llama"), tiny("llama")
    damaged.model.layers[0].mlp.down_proj.weight.mul_(-1)
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    result = compare_with_baseline(damaged, baseline, torch.tensor(ids[:192]).view(6, 32))
    assert result["kl_mean"] > 10 * result["kl_noise_floor"]
    assert 0 < result["kl_p50"] <= result["kl_p90"] <= result["kl_p99"] <= result["kl_max"]
    assert result["top1_agreement"] < 1
    assert result["perplexity_ratio"] == pytest.approx(result["perplexity"] / result["baseline_perplexity"], rel=1e-9)
    assert result["perplexity_ratio_low"] < result["perplexity_ratio"] < result["perplexity_ratio_high"]


def test_bad_input_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="neither a file nor a builtin"):
        evaluate(tmp_path / "no-model", text=str(tmp_path / "no-text.txt"))
    with pytest.raises(InputError, match="unknown dtype 'float23'; did you mean 'float32'"):
        load_any(tmp_path, dtype="float23")


def test_recognises_its_own_checkpoints(tmp_path):
    config = tmp_path / "config.json"
    assert not is_anybit_directory(tmp_path)
    config.write_text('{"model_type": "llama"}')
    assert not is_anybit_directory(tmp_path)
    config.write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert not is_anybit_directory(tmp_path)
    config.write_text('{"quantization_config": {"quant_method": "anybit"}}')
    assert is_anybit_directory(tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        is_anybit_directory(tmp_path)
