"""Checkpoints opened on either engine, and text generated with them."""

import logging

import pytest

from anybit.engine.generate import generate
from anybit.engine.native import NativeModel
from anybit.engine.open import open_engine
from anybit.engine.stepper import stepper
from anybit.errors import InputError, KernelUnavailable
from anybit.kernels import native
from tiny_checkpoints import quantize_tiny
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")

PROMPT = "once upon"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("llama"))


def greedy(model, ids, count):
    model.reset()
    tokens, logits = [], model.prefill(ids)
    while len(tokens) < count:
        tokens.append(int(logits.argmax()))
        logits = model.step({0: tokens[-1]})[0]
    return tokens


def test_generates_what_the_model_says(llama):
    model, tokenizer = open_engine(llama)
    assert isinstance(model, NativeModel)
    pieces = []
    result = generate(model, tokenizer, PROMPT, max_new_tokens=24, on_text=pieces.append)
    assert result.token_ids == greedy(model, tokenizer(PROMPT)["input_ids"], 24)
    assert len(set(result.token_ids)) > 3
    assert (
        "".join(pieces) == result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True).rstrip("\ufffd")
    )
    assert (result.tokens, result.prompt_tokens) == (24, 9)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=24).token_ids == result.token_ids  # the first left nothing


def test_both_engines_agree_within_the_activations_rounding(llama):
    (ours, tokenizer), (theirs, _) = open_engine(llama, "native"), open_engine(llama, "torch")
    ids = tokenizer(PROMPT)["input_ids"]
    expected = stepper(theirs).prefill(ids)
    assert float(abs(stepper(ours).prefill(ids) - expected).max() / expected.std()) < 0.1


def test_stops_at_the_end_and_refuses_what_does_not_fit(llama):
    model, tokenizer = open_engine(llama)
    free = generate(model, tokenizer, PROMPT, max_new_tokens=20).token_ids
    assert model.end_ids == {2}
    model.end_ids = frozenset([free[5]])
    assert generate(model, tokenizer, PROMPT, max_new_tokens=20).token_ids == free[: free.index(free[5]) + 1]
    with pytest.raises(InputError, match=r"\(9 tokens\) and 120 new tokens exceed the model's context of 128"):
        generate(model, tokenizer, PROMPT, max_new_tokens=120)


def test_auto_falls_back_and_says_why(tmp_path, caplog):
    checkpoint = quantize_tiny("gpt2", tmp_path)
    with caplog.at_level(logging.WARNING, "anybit"):
        model, _ = open_engine(checkpoint)
    assert not isinstance(model, NativeModel)
    assert "torch engine runs this model, more slowly: architecture 'gpt2' is not one of" in caplog.text
    with pytest.raises(KernelUnavailable, match="architecture 'gpt2'"):
        open_engine(checkpoint, "native")
    with pytest.raises(InputError, match="unknown engine 'gpu'; known: auto, native, torch"):
        open_engine(checkpoint, "gpu")


def test_sampling_is_a_function_of_the_seed(llama):
    model, tokenizer = NativeModel.open(llama, threads=1), tiny_tokenizer()
    runs = [generate(model, tokenizer, PROMPT, max_new_tokens=16, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].token_ids == runs[1].token_ids != runs[2].token_ids
