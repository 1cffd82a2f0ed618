"""What people do with a model in transformers, done with a quantized one: load float, compile, draft, dequantize, save."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import anybit
from anybit.checkpoint.ledger import Ledger
from anybit.checkpoint.verify import verify
from anybit.errors import FormatError, InputError, RecipeError, StructureError
from anybit.formats.kv import KVSpec
from anybit.integrations.assistant import at_precision
from anybit.integrations.transformers import AnybitConfig
from anybit.layers.kv_cache import KVCache
from nested_case import nest
from tiny_checkpoints import quantize_tiny
from tiny_models import save_tiny, tiny_tokenizer, token_ids

GREEDY = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
FAMILIES = {"llama": {}, "tied llama": {"tie_word_embeddings": True}, "qwen2": {}, "gemma3": {}, "opt": {}}


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


def logits(model, ids=token_ids(20)):  # noqa: B008 - never changed
    with torch.inference_mode():
        return model(input_ids=ids).logits


def generate(model, **options):
    ids = torch.cat([token_ids(12)] * 2, 1)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY, **options).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("uses"), config={"tie_word_embeddings": True})


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    return nest(quantize_tiny("llama", tmp_path_factory.mktemp("nested")))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_as_it_loads_is_what_quantize_writes(family, half, tmp_path):
    out = quantize_tiny(family.split()[-1], tmp_path, config=FAMILIES[family], half=half)
    model = load(tmp_path / "float", quantization_config=AnybitConfig(recipe="rtn-w4"))
    written = load(out)
    assert torch.equal(logits(model), logits(written))
    theirs, ours = written.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ledger = anybit.save(model, tmp_path / "saved", tiny_tokenizer())
    rows = {row.name: row.sha256 for row in Ledger.read(out).tensors}
    assert {row.name: row.sha256 for row in ledger.tensors} == rows
    assert torch.equal(logits(anybit.load(tmp_path / "saved")), logits(model))


def test_overrides_and_activations_as_it_loads(tmp_path):
    save_tiny("llama", tmp_path / "float")
    three = load(tmp_path / "float", quantization_config=AnybitConfig(recipe="rtn-w4", overrides=["weights.bits=3"]))
    assert three.model.layers[0].mlp.up_proj.weight.shape == (3, 96, 8)
    three.save_pretrained(tmp_path / "three")
    assert torch.equal(logits(load(tmp_path / "three")), logits(three))
    eight = quantize_tiny("llama", tmp_path, recipe="bipolar-w4a4")
    model = load(tmp_path / "float", quantization_config=AnybitConfig(recipe="bipolar-w4a4"))
    assert torch.equal(logits(model), logits(load(eight)))
    assert "activations" in model.model.layers[0].mlp.up_proj.form


@pytest.mark.parametrize(
    ("family", "options", "error", "match"),
    [
        ("llama", {"recipe": "gptq-w4"}, RecipeError, "method 'gptq' of .* needs calibration"),
        ("llama", {"recipe": "awq-w4"}, RecipeError, "transform 'awq-scale' works on whole blocks"),
        ("llama", {"recipe": "abq-w4a4"}, RecipeError, "works on whole blocks"),
        ("llama", {"recipe": "rtn-w44"}, RecipeError, "did you mean 'rtn-w4'"),
        ("llama", {}, RecipeError, "names no recipe"),
        ("gpt2", {"recipe": "rtn-w4"}, StructureError, "use `anybit quantize`"),
    ],
)
def test_what_needs_more_than_weights_is_refused_as_it_loads(family, options, error, match, tmp_path):
    save_tiny(family, tmp_path / "float")
    with pytest.raises(error, match=match):
        load(tmp_path / "float", quantization_config=AnybitConfig(**options))


def test_a_saved_model_is_complete_and_its_ledger_true(checkpoint, tmp_path):
    model = load(checkpoint)
    ledger = anybit.save(model, tmp_path / "again")
    before = Ledger.read(checkpoint)
    assert ledger.model_dump() == before.model_dump()
    assert verify(tmp_path / "again").model_dump() == before.model_dump()
    assert torch.equal(logits(anybit.load(tmp_path / "again")), logits(model))
    with pytest.raises(InputError, match="not empty"):
        anybit.save(model, tmp_path / "again")
    half = anybit.save(load(checkpoint, dtype=torch.bfloat16), tmp_path / "half")
    assert half.size_bytes < before.size_bytes
    assert "another dtype" in half.warnings[-1]
    anybit.load(tmp_path / "half")


def test_save_refuses_what_the_ledger_cannot_say(checkpoint, tmp_path):
    model = load(checkpoint)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0, 0] ^= 1
    with pytest.raises(FormatError, match=r"up_proj\.weight was changed"):
        anybit.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="not quantized by anybit"):
        anybit.save(AutoModelForCausalLM.from_pretrained(checkpoint.with_name("float")), tmp_path / "out")
    load(checkpoint).save_pretrained(tmp_path / "plain")
    with pytest.raises(FormatError, match=r"save it with anybit\.save"):
        anybit.load(tmp_path / "plain")


def test_one_graph_gives_the_same_answer(checkpoint):
    model = load(checkpoint)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(input_ids=token_ids(20), use_cache=False).logits
    assert torch.equal(found, expected)


def test_drafting_never_changes_the_text(nested):
    model = load(nested)
    plain = generate(model)
    assert generate(model, prompt_lookup_num_tokens=5, max_matching_ngram_size=2) == plain
    draft = at_precision(model, 2)
    assert not torch.equal(logits(draft), logits(model))
    assert generate(model, assistant_model=draft) == plain
    assert (model.precision.bits, draft.precision.bits) == (8, 2)


def test_the_draft_model_owns_no_weights(nested):
    model = load(nested)
    logits(model)
    ours = {p.data_ptr() for p in model.parameters()}
    draft = at_precision(model, 3)
    assert {p.data_ptr() for p in draft.parameters()} == ours
    low = load(nested)
    low.precision.bits = 3
    assert torch.equal(logits(draft), logits(low))
    assert draft.model.layers[0].mlp.up_proj.terms()[0].planes.data_ptr() in ours
    with pytest.raises(InputError, match="precision 7"):
        at_precision(model, 7)
    with pytest.raises(InputError, match="holds no precisions"):
        at_precision(AutoModelForCausalLM.from_pretrained(nested.with_name("float")), 2)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}])
def test_a_quantized_cache_of_ones_own(checkpoint, options):
    model = load(checkpoint)
    spec = KVSpec(key_bits=8, value_bits=8)
    cache = KVCache(spec, model.config.num_hidden_layers)
    found = generate(model, past_key_values=cache, **options)
    assert cache.get_seq_length() >= 24 + 23
    assert found == generate(model, past_key_values=KVCache(spec, model.config.num_hidden_layers))


@pytest.mark.parametrize("family", ["tied llama", "qwen2", "opt"])
def test_dequantized_is_an_ordinary_float_model(family, tmp_path):
    out = quantize_tiny(family.split()[-1], tmp_path, config=FAMILIES[family])
    model = load(out)
    expected = logits(model)
    dense = load(out).dequantize()
    assert not any(type(m).__module__.startswith("anybit") for m in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "dense")), logits(dense))


def test_dequantized_at_the_precision_in_use(nested, tmp_path):
    model = load(nest(quantize_tiny("llama", tmp_path), but=["embed_tokens"]))
    full = logits(model)
    model.precision.bits = 2
    low = logits(model)
    assert not torch.allclose(low, full, atol=1e-2)
    torch.testing.assert_close(logits(model.dequantize()), low, rtol=1e-4, atol=1e-4)
    twice = load(nested)  # its embedding is read in full at every precision
    twice.precision.bits = 2
    with pytest.raises(FormatError, match="two widths"):
        twice.dequantize()


@pytest.mark.parametrize(
    ("family", "recipe", "match"), [("gpt2", "rtn-w4", "no float form"), ("llama", "bipolar-w4a4", "changes its input")]
)
def test_what_no_float_model_does_is_not_dequantized(family, recipe, match, tmp_path):
    with pytest.raises(FormatError, match=match):
        load(quantize_tiny(family, tmp_path, recipe=recipe)).dequantize()


def test_without_the_import_nothing_is_loaded_as_noise(checkpoint):
    code = f"""
import torch, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, dtype=torch.float32)
except Exception as error:
    print(type(error).__name__, "shape" in str(error) or "size" in str(error) or "mismatch" in str(error), error)
else:
    print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(("RuntimeError True", "ValueError")), done.stdout + done.stderr


def test_a_checkpoint_edited_by_hand_is_found_out_on_saving(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = next(
        file for file in sorted(copy.glob("*.safetensors")) if "model.layers.0.mlp.up_proj.scale" in load_file(file)
    )
    state = load_file(shard)
    state["model.layers.0.mlp.up_proj.scale"][0, 0] *= 2
    save_file(state, shard, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj\.scale was changed"):
        anybit.save(load(copy), tmp_path / "out")
