"""anybit -> compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.progress import Progress
from anybit.errors import FormatError
from anybit.formats.floating import Floating
from anybit.formats.planes import unpack
from anybit.integrations.compressed_tensors.scheme import FLOAT, INTEGER, MIXED, Scheme, scheme
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint, Layer
from anybit.integrations.exchange.directory import write_directory
from anybit.integrations.exchange.packing import pack_words
from anybit.integrations.exchange.rules import check_layer

FP8_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def write(source: Checkpoint, root: Path, account: Account, progress: Progress) -> None:
    """A compressed-tensors directory: linears stay quantized, in as many config groups as needed; the head becomes float, which
    is what vLLM reads."""
    schemes: dict[str, Scheme] = {}
    for name in source.linears():
        if name in source.forms:
            check_layer(name, source.forms[name], account, activations=True)
            schemes[name] = scheme(name, source.forms[name], source.width(name), account)
    encoders = {name: partial(_encode, found["format"], account) for name, found in schemes.items()}
    cache, scales = _cache(source, account)
    config = quantization_config(source, schemes) | {"kv_cache_scheme": cache}
    _say(schemes, account)
    write_directory(source, root, encoders, config, account, progress, scales)


def quantization_config(source: Checkpoint, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Layers of one scheme share a config group; the only group of a model targets the class, several name their layers."""
    groups: dict[str, list[str]] = {}
    for name, found in schemes.items():
        groups.setdefault(json.dumps(found), []).append(name)
    if not groups:
        raise FormatError(f"{source.directory}: no linear layer of it is quantized, there is nothing to export")
    linears = [name for name, module in source.modules.items() if isinstance(module, nn.Linear)]
    found = {
        f"group_{index}": {"targets": ["Linear"] if len(groups) == 1 else names, **json.loads(text)}
        for index, (text, names) in enumerate(groups.items())
    }
    formats = {group["format"] for group in found.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in schemes],
        "config_groups": found,
    }


def _say(schemes: Mapping[str, Scheme], account: Account) -> None:
    """What readers are known to make of these schemes."""
    if any(not s["weights"]["symmetric"] for s in schemes.values()):
        account.note(
            "asymmetric codes: transformers 5.23 with compressed-tensors 0.20 loads them with "
            "CompressedTensorsConfig(dequantize=True) only, which rounds weights to float16; vLLM loads them as they are"
        )
    if any(s["weights"]["num_bits"] in (3, 5, 6, 7) for s in schemes.values()):
        account.note("3, 5, 6 and 7 bits are packed as compressed-tensors 0.20 does; 0.17 packs them otherwise")


def _encode(kind: str, account: Account, layer: Layer) -> dict[str, Tensor]:
    static = {"input_scale": layer.tensors["input_scale"].clone()} if "input_scale" in layer.tensors else {}
    term = layer.code(account)
    if kind == FLOAT:
        assert isinstance(term.decoder, Floating)
        weight = unpack(term.planes, term.shape[1]).view(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": term.decoder.scale.clone(), **static}
    grid = layer.integer_grid(account)
    scale = grid.scale.half() if torch.equal(grid.scale.half().float(), grid.scale) else grid.scale
    if kind == INTEGER:
        weight = (grid.codes.short() - 128).to(torch.int8)
        return {"weight": weight, "weight_scale": scale, **static}
    packed = {
        "weight_packed": pack_words(grid.codes, grid.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
    }
    part = layer.form["terms"][0]
    if not (part["kind"] == "affine" and part["symmetric"]):
        packed["weight_zero_point"] = pack_words(grid.zero.T.contiguous().to(torch.uint8), grid.bits).T.contiguous()
    return packed | static


def _cache(source: Checkpoint, account: Account) -> tuple[Scheme | None, dict[str, Tensor]]:
    """`kv_cache_scheme` and its scales. Engines know one: float8 with a fixed scale for each layer's keys and values."""
    if not source.kv:
        return None, {}
    account.lose(
        "keys and values with ranges found per token or channel; float8 with scale 1 is written",
        "quantization_config.kv",
    )
    ones = [f"{name}.{which}_scale" for name in source.modules if name.endswith(".self_attn") for which in "kv"]
    return dict(FP8_CACHE), {name: torch.ones(1) for name in ones}
