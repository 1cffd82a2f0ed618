"""The generation loop against `model.generate`, streaming, sampling and refusals."""

import pytest
import torch

from anybit.engine.detokenize import Detokenizer
from anybit.engine.generate import generate
from anybit.errors import InputError, PromiseError
from anybit.evaluate.speed import measure_generation
from anybit.formats.affine import Affine
from anybit.formats.terms import CodeTerm, save_terms
from anybit.layers.linear import QuantLinear
from tiny_models import tiny, tiny_tokenizer

PROMPT = "once é"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2", "opt", "qwen3_moe"])
def test_greedy_equals_transformers(family, tokenizer):
    model = tiny(family)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    result = generate(model, tokenizer, PROMPT, max_new_tokens=40)
    assert result.token_ids == expected[0, ids.shape[1] :].tolist()
    assert len(set(result.token_ids)) > 1
    assert result.tokens == len(result.token_ids)
    assert result.prompt_tokens == ids.shape[1] == 7
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0


def test_stops_at_end_of_sequence(tokenizer):
    model = tiny("llama")
    free = generate(model, tokenizer, PROMPT, max_new_tokens=20).token_ids
    end = free[5]
    model.generation_config.eos_token_id = [1, end]
    result = generate(model, tokenizer, PROMPT, max_new_tokens=20)
    assert result.token_ids == free[: free.index(end) + 1]
    assert result.text == tokenizer.decode(result.token_ids[:-1], skip_special_tokens=True).rstrip("\ufffd")


def test_decode_steps_of_a_quantized_model_leave_the_cores_to_our_threads(tokenizer):
    model, seen, before = tiny("llama"), [], torch.get_num_threads()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        generate(model, tokenizer, PROMPT, max_new_tokens=3)
        assert seen == [2, 2, 2]
        weight = model.lm_head.weight.detach()
        affine = Affine.fit(weight, 8, 16)
        form, tensors = save_terms([CodeTerm.from_codes(affine.encode(weight), affine)], tuple(weight.shape))
        model.lm_head = QuantLinear(form, bias=False)
        model.lm_head.fill(tensors)
        generate(model, tokenizer, PROMPT, max_new_tokens=3)
        assert seen[3:] == [2, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_single_token_has_no_decode_speed(tokenizer):
    result = generate(tiny("llama"), tokenizer, PROMPT, max_new_tokens=1)
    assert (result.tokens, result.decode_tokens_per_second) == (1, 0.0)


def test_sampling_is_a_function_of_the_seed(tokenizer):
    model = tiny("llama")

    def sample(seed, temperature=1.0):
        options = {"max_new_tokens": 24, "temperature": temperature, "seed": seed}
        return generate(model, tokenizer, PROMPT, **options).token_ids

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    assert sample(3, temperature=1e-30) == generate(model, tokenizer, PROMPT, max_new_tokens=24).token_ids


def test_streamed_pieces_are_whole_characters_and_make_the_text(tokenizer):
    pieces = []
    result = generate(tiny("llama"), tokenizer, PROMPT, max_new_tokens=64, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert all(pieces)


@pytest.mark.parametrize("text", ["plain", "né à l'œuvre", "日本語 🙂🙃 end", " leading", "🙂"])
def test_detokenizer_waits_for_whole_characters(text, tokenizer):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(
        text
    )  # one token per byte here: each character at its last byte
    assert detokenizer.flush() == ""


def test_detokenizer_drops_a_character_that_never_ended(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    cut = tokenizer("ab🙂")["input_ids"][:-1]
    assert "".join(detokenizer.push(token) for token in cut) + detokenizer.flush() == "ab"


def test_chat_template_and_conversations(tokenizer):
    model, templated = tiny("llama"), tiny_tokenizer()
    templated.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    expected = generate(model, tokenizer, "[user]hi[a]", max_new_tokens=8)
    assert generate(model, templated, "hi", max_new_tokens=8, chat=True).token_ids == expected.token_ids
    turns = [{"role": "user", "content": "x"}, {"role": "b", "content": "y"}]
    assert generate(model, templated, turns, max_new_tokens=1, chat=True).prompt_tokens == len("[user]x[b]y[a]")
    with pytest.raises(InputError, match="no chat template"):
        generate(model, tokenizer, "hi", max_new_tokens=8, chat=True)
    with pytest.raises(InputError, match="needs chat=True"):
        generate(model, tokenizer, turns, max_new_tokens=8)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ("x", {"temperature": -1.0}, "temperature >= 0"),
        ("x" * 100, {"max_new_tokens": 29}, r"\(100 tokens\) and 29 new tokens exceed the model's context of 128"),
    ],
)
def test_refusals(prompt, options, message, tokenizer):
    with pytest.raises(InputError, match=message):
        generate(tiny("llama"), tokenizer, prompt, **{"max_new_tokens": 4, **options})


def test_nan_logits_are_an_error(tokenizer):
    model = tiny("llama")
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(PromiseError, match="NaN"):
        generate(model, tokenizer, PROMPT, max_new_tokens=4)


def test_measure_generation_reports_the_same_run(tokenizer):
    model, pieces = tiny("llama"), []
    measured = measure_generation(model, tokenizer, PROMPT, 12, on_text=pieces.append)
    result = generate(model, tokenizer, PROMPT, max_new_tokens=12)
    assert (measured["text"], measured["tokens"], measured["prompt_tokens"]) == (result.text, 12, 7)
    assert "".join(pieces) == result.text  # the warm-up is not streamed
    assert measured["prefill_tokens_per_second"] > 0
    assert measured["decode_tokens_per_second"] > 0
