"""A nested checkpoint read at p bits is the p-bit model, and a switch in mid-text is the dense model of the new width.

    python benchmarks/nested_identity.py CHECKPOINT [--prompts 50] [--out FILE]

Constant schedule: for every precision p a copy of the checkpoint is made whose planes below p and whose other tables are
random bytes; the native decoder must give the same tokens from both. Switch: float weights decoded at p (`formats`), put into
the float model, continue the same cache that the quantized model filled at its highest precision; logits are compared.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from anybit.calibration.text import read_documents
from anybit.checkpoint.layout import read_config
from anybit.engine.generate import generate
from anybit.engine.native import NativeModel
from anybit.engine.open import open_tokenizer
from anybit.formats.form import precisions
from anybit.formats.terms import dense
from anybit.layers.linear import QuantLinear
from anybit.loading import load_any
from anybit.machine import machine

LENGTH = 48
STEPS = 24


def poisoned(source: Path, target: Path, bits: int) -> None:
    """A copy whose tensors hold noise wherever precision `bits` must not look."""
    shutil.copytree(source, target)
    layers, draw = read_config(source)["quantization_config"]["layers"], torch.Generator().manual_seed(bits)
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        for name, tensor in tensors.items():
            layer, _, key = name.rpartition(".")
            part = layers.get(layer, {"terms": [{}]})["terms"][0]
            if part.get("kind") != "nested_affine":
                continue
            noise = torch.randint(1, 255, tensor.shape, dtype=torch.uint8, generator=draw)
            table = min(width for width in part["tables"] if width >= bits)
            if key == "weight":
                tensors[name] = torch.cat([tensor[:bits], noise[bits:]])
            elif key != "scale" and key not in (f"zero{table}", f"ratio{table}"):
                tensors[name] = noise
        save_file(tensors, path, metadata={"format": "pt"})


def tokens_at(directory: Path, prompts: list[str], bits: int) -> list[list[int]]:
    """Greedy continuations at a constant precision."""
    model, tokenizer = NativeModel.open(directory, verify=False), open_tokenizer(directory)
    asked = {"schedule": str(bits), "prefill_precision": bits}
    return [generate(model, tokenizer, prompt, max_new_tokens=LENGTH, **asked).token_ids for prompt in prompts]


def constant(source: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """Per precision: tokens made, and how many differ between the checkpoint and its poisoned copy."""
    layers, rows = read_config(source)["quantization_config"]["layers"], []
    widths = next(found for form in layers.values() if len(found := precisions(form)) > 1)
    for bits in widths:
        with tempfile.TemporaryDirectory() as directory:
            copied = Path(directory) / "copy"
            poisoned(source, copied, bits)
            ours, other = (tokens_at(path, prompts, bits) for path in (source, copied))
            control = min(width for width in widths if width != bits)
            moved = tokens_at(copied, prompts[:2], control) != tokens_at(source, prompts[:2], control)
        pairs = [pair for a, b in zip(ours, other, strict=True) for pair in itertools.zip_longest(a, b)]
        rows.append({"bits": bits, "tokens": len(pairs), "differing": sum(a != b for a, b in pairs)})
        rows[-1] |= {"noise_moves_other_widths": moved}
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def switched(source: Path, prompts: list[str], bits: int) -> dict[str, Any]:
    """Largest difference of a logit from the dense model of `bits`, as a share of the spread of all logits, over the steps after
    a switch; both continue one cache with the same tokens."""
    model, tokenizer = load_any(source)
    float_model, _ = load_any("demo")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = float_model.get_submodule(name).weight
            weight.copy_(dense(module.terms(), bits if bits in precisions(module.form) else None))
    float_model.get_input_embeddings().weight.copy_(dense(model.get_input_embeddings().terms()))
    worst, agree = 0.0, []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        model.precision.bits = model.precision.available[-1]
        filled = model(ids, past_key_values=DynamicCache(), use_cache=True)
        caches, model.precision.bits = (copy.deepcopy(filled.past_key_values), filled.past_key_values), bits
        token = filled.logits[:, -1:].argmax(-1)
        for _ in range(STEPS):
            ours = model(token, past_key_values=caches[0], use_cache=True).logits[0, -1]
            reference = float_model(token, past_key_values=caches[1], use_cache=True).logits[0, -1]
            worst = max(worst, float((ours - reference).abs().max() / reference.std()))
            agree.append(bool(ours.argmax() == reference.argmax()))
            token = ours.argmax().view(1, 1)
    return {"bits": bits, "steps": len(agree), "largest_difference_of_spread": worst, "same_choice": sum(agree)}


def main() -> None:
    """Both runs, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nested-identity-smollm2.json")
    options = parser.parse_args()
    articles = read_documents("wiki-test")
    draw = np.random.default_rng(0)
    prompts = [
        " ".join(articles[i % len(articles)].split()[: int(draw.integers(8, 60))]) for i in range(options.prompts)
    ]
    found = {
        "machine": machine(),
        "command": f"python benchmarks/nested_identity.py CHECKPOINT --prompts {options.prompts}",
    }
    found["constant"] = constant(options.checkpoint, prompts)
    found["switch"] = [switched(options.checkpoint, prompts[:8], bits) for bits in (2, 3, 4, 6)]
    print(found["switch"])
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
