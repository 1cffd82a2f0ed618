"""A checkpoint is a transformers model like any other: save, load, cast, generate; what does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from anybit.errors import FormatError, StructureError
from anybit.integrations.on_import import TARGET, register_with_transformers
from anybit.layers.embedding import QuantEmbedding, TiedHead
from anybit.layers.linear import QuantLinear
from tiny_checkpoints import quantize_tiny

FAMILIES = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "gpt2": {},
    "mixtral": {},
    "gemma3": {},
    "opt": {},
}
IDS = torch.arange(4, 24)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("integration")
    return quantize_tiny(request.param.split()[-1], directory, config=FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("llama"))


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_saving_and_loading_again_changes_nothing(checkpoint, tmp_path):
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    before, after = (json.loads((d / "config.json").read_text()) for d in (checkpoint, tmp_path / "again"))
    assert after["quantization_config"] == before["quantization_config"]
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_placing_on_a_device_changes_nothing(checkpoint):
    plain = load(checkpoint)
    for device_map in ("cpu", {"": "cpu"}):
        assert torch.equal(logits(load(checkpoint, device_map=device_map)), logits(plain))


def test_bfloat16_answers_nearly_the_same_and_generates(checkpoint):
    model = load(checkpoint, dtype=torch.bfloat16)
    found, expected = logits(model), logits(load(checkpoint))
    assert found.dtype == torch.bfloat16
    difference = (found.float() - expected).abs().amax(-1).median() / expected.std()  # routers of experts may flip
    assert float(difference) < 0.15
    fixed = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=fixed).shape == (1, 25)


def test_our_layers_are_in_their_places(checkpoint):
    model = load(checkpoint)
    forms = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["layers"]
    ours = {name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantEmbedding))}
    assert ours == set(forms)
    tied = getattr(model.config, "tie_word_embeddings", False)
    assert isinstance(model.get_output_embeddings(), TiedHead if tied else QuantLinear)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert not model.training
    assert model.is_quantized


@pytest.mark.parametrize(
    "tensor", ["self_attn.q_proj.weight", "self_attn.q_proj.scale", "mlp.up_proj.zero", "input_layernorm.weight"]
)
def test_a_tensor_that_is_missing_is_never_made_up(llama, tmp_path, tensor):
    broken = shutil.copytree(llama, tmp_path / "broken")
    name, shard = f"model.layers.1.{tensor}", broken / "model-00003-of-00004.safetensors"
    state = load_file(shard)
    del state[name]
    save_file(state, shard, metadata={"format": "pt"})
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load(broken)


def edited(llama, tmp_path, change):
    copy = shutil.copytree(llama, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(version=2), "format version 2, this anybit reads 1; update anybit"),
        (lambda q: q["layers"].update({"model.nowhere": q["layers"]["model.embed_tokens"]}), r"'model\.nowhere'"),
        (lambda q: q["layers"]["model.embed_tokens"]["shape"].reverse(), r"'model\.embed_tokens' is"),
        (lambda q: q["layers"]["model.embed_tokens"]["terms"][0].update(kind="magic"), "decoder 'magic' is not known"),
        (lambda q: q["layers"]["model.embed_tokens"]["terms"][0].update(term="magic"), "term 'magic' is not known"),
    ],
)
def test_what_this_version_cannot_read_is_refused(llama, tmp_path, change, match):
    with pytest.raises(FormatError, match=match):
        load(edited(llama, tmp_path, change))


def test_a_layer_missing_from_the_config_is_no_float_layer_of_noise(llama, tmp_path):
    copy = edited(llama, tmp_path, lambda q: q["layers"].pop("model.layers.0.mlp.up_proj"))
    with pytest.raises((RuntimeError, FormatError, StructureError)):
        load(copy)


def test_config_alone_keeps_the_forms(llama):
    config = AutoConfig.from_pretrained(llama)
    assert config.quantization_config["quant_method"] == "anybit"


def test_registering_again_does_nothing():
    import sys

    assert TARGET in sys.modules
    finders = list(sys.meta_path)
    register_with_transformers()
    register_with_transformers()
    assert sys.meta_path == finders
