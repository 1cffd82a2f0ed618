"""The parts of every family, and refusals that say what was found."""

from __future__ import annotations

import pytest
from torch import nn

from anybit.errors import StructureError
from anybit.models.normalize import normalize
from anybit.models.structure import Geometry, find_structure
from tiny_models import FAMILIES, tiny

# family: (blocks, pre, final norm, embedding, tied, kv heads)
_LLAMA = ("model.layers", ("model.rotary_emb",), "model.norm", "model.embed_tokens", False, 2)
EXPECTED = dict.fromkeys(FAMILIES, _LLAMA) | {
    "gemma2": (*_LLAMA[:4], True, 2),
    "gemma3": (*_LLAMA[:4], True, 2),
    "opt": (
        "model.decoder.layers",
        ("model.decoder.embed_positions",),
        "model.decoder.final_layer_norm",
        "model.decoder.embed_tokens",
        True,
        4,
    ),
    "falcon": (
        "transformer.h",
        ("transformer.rotary_emb",),
        "transformer.ln_f",
        "transformer.word_embeddings",
        True,
        1,
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        ("gpt_neox.rotary_emb",),
        "gpt_neox.final_layer_norm",
        "gpt_neox.embed_in",
        False,
        4,
    ),
    "gpt2": ("transformer.h", ("transformer.wpe",), "transformer.ln_f", "transformer.wte", True, 4),
    "bloom": (
        "transformer.h",
        ("transformer.word_embeddings_layernorm",),
        "transformer.ln_f",
        "transformer.word_embeddings",
        True,
        4,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_geometry(family):
    model = tiny(family)
    normalize(model)
    found = find_structure(model)
    blocks, pre, norm, embedding, tied, kv_heads = EXPECTED[family]
    assert found.blocks == (f"{blocks}.0", f"{blocks}.1")
    assert (found.pre, found.final_norm, found.embedding, found.tied) == (pre, norm, embedding, tied)
    assert model.get_submodule(found.head) is model.get_output_embeddings()
    assert found.geometry == Geometry(hidden=64, heads=4, kv_heads=kv_heads, head_dim=16, vocab=260)


def test_not_a_language_model():
    with pytest.raises(StructureError, match="no input embedding"):
        find_structure(nn.Sequential(nn.Linear(2, 2)))


def test_no_blocks():
    model = tiny("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(StructureError, match=r"no ModuleList of decoder blocks; found model \(LlamaModel\)"):
        find_structure(model)
