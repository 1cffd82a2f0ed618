"""compressed-tensors -> anybit: pack-quantized, int-quantized, float-quantized, and groups of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.floating import Floating, FloatType
from anybit.formats.terms import CodeTerm, save_terms
from anybit.integrations.compressed_tensors.scheme import FLOAT, INTEGER, MIXED, PACKED, activations
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.foreign import Shape, Stored, affine_layer, half_scale, setting, wanted
from anybit.integrations.exchange.packing import unpack_words, words


class Reader:
    """`quantization_config` of a compressed-tensors directory, and layers as forms and tensors of ours."""

    names = (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
    )

    def __init__(self, config: Mapping[str, Any], account: Account) -> None:
        """Raises FormatError for settings that make no sense."""
        self._account = account
        whole = setting(config, "format", str, among=(PACKED, INTEGER, FLOAT, MIXED))
        self.format = f"compressed-tensors {whole}"
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(_has_targets(group) for group in groups.values()):
            raise FormatError("quantization_config.config_groups is missing or has groups without a list of targets")
        self._groups, self._whole = list(groups.values()), whole
        if config.get("kv_cache_scheme"):
            account.lose("its float8 cache with fixed scales; the imported model caches in 16 bits", "kv_cache_scheme")

    def layer(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Stored:
        """`tensors` are those of `names` that the files have. Raises FormatError for shapes that do not fit."""
        group = self._group(name)
        if "weight_g_idx" in tensors:
            raise FormatError(f"{name}: its config group reorders columns (actorder), which is not read")
        if tensors.get("weight_shape", torch.tensor(shape)).tolist() != list(shape):
            raise FormatError(f"{name}.weight_shape is not the {list(shape)} of config.json")
        if group.get("output_activations"):
            self._account.lose("quantized outputs; they stay float", name)
        size = self._group_size(name, group["weights"], shape[1])
        read = self._float if group["format"] == FLOAT else self._integer
        form, own = read(name, shape, size, group, tensors)
        spec = activations(name, group.get("input_activations"), shape[1])
        if spec is None:
            return form, own
        if spec["static"]:
            flat = {key: tensor.reshape(-1) for key, tensor in tensors.items() if key == "input_scale"}
            scale = wanted(flat, "input_scale", name, None, (1,)).float()
            if float(scale) <= 0:
                raise FormatError(f"{name}.input_scale is {float(scale)}; need a positive number")
            own = own | {"input_scale": scale}
        return form | {"activations": spec}, own

    def _integer(
        self, name: str, shape: Shape, size: int, group: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Stored:
        (rows, columns), weights = shape, group["weights"]
        bits = setting(weights, "num_bits", int, among=range(1, 9))
        count = columns // size
        if group["format"] == INTEGER:
            signed = wanted(tensors, "weight", name, torch.int8, shape).short()
            codes = (signed + 2 ** (bits - 1)).to(
                torch.uint8
            )  # one below 0 becomes one beyond the width, and is refused
        else:
            packed = wanted(tensors, "weight_packed", name, torch.int32, (rows, words(columns, bits)))
            codes = unpack_words(packed, bits, columns)
        scale = wanted(tensors, "weight_scale", name, None, (rows, count)).float()
        zero = torch.full((rows, count), 2 ** (bits - 1))
        if not setting(weights, "symmetric", bool):
            key = "weight_zero_point"
            if group["format"] == INTEGER:
                zero = zero + wanted(tensors, key, name, torch.int8, (rows, count)).int()
            else:
                found = wanted(tensors, key, name, torch.int32, (words(rows, bits), count))
                zero = unpack_words(found.T.contiguous(), bits, rows).T.int()
        return affine_layer(name, (bits, size), codes, scale, zero, self._account)

    def _float(
        self, name: str, shape: Shape, size: int, group: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Stored:
        setting(group["weights"], "num_bits", int, among=(8,))
        codes = wanted(tensors, "weight", name, torch.float8_e4m3fn, shape).view(torch.uint8)
        scale = wanted(tensors, "weight_scale", name, None, (shape[0], shape[1] // size)).float()
        if bool((scale <= 0).any()):
            raise FormatError(f"{name}.weight_scale holds numbers that are not positive")
        decoder = Floating(FloatType(4, 3), size, half_scale(name, scale, self._account))
        return save_terms([CodeTerm.from_codes(codes, decoder)], shape)

    def _group_size(self, name: str, weights: Mapping[str, Any], columns: int) -> int:
        strategy = weights.get("strategy")
        if strategy == "channel":
            return columns
        size = weights.get("group_size")
        if strategy != "group" or type(size) is not int or size < 1 or columns % size:
            raise FormatError(
                f"{name}: weights by '{strategy}' with group_size {size} for {columns} columns are not read; 'channel' is, "
                "and 'group' with a divisor"
            )
        return size

    def _group(self, name: str) -> dict[str, Any]:
        """The config group of a layer: one that names it, one whose regex does, else the one for its class."""
        for fits in (_named, _matched, _classed):
            for group in self._groups:
                if any(fits(target, name) for target in group["targets"]):
                    return _readable(group, name, self._whole)
        raise FormatError(f"{name} is in no config group although it has quantized tensors")


def _has_targets(group: Any) -> bool:
    targets = group.get("targets") if isinstance(group, dict) else None
    return isinstance(targets, list) and all(isinstance(target, str) for target in targets)


def _readable(group: Mapping[str, Any], name: str, whole: str) -> dict[str, Any]:
    """A config group with its own format or that of the whole model, and with defaults where older writers leave them out.

    Raises:
        FormatError: weights of a kind that is not read.
    """
    weights, own = group.get("weights"), group.get("format") or whole
    if not isinstance(weights, dict) or own not in (PACKED, INTEGER, FLOAT):
        raise FormatError(f"{name}: weights {weights!r} as {own!r} are not read")
    weights = {"type": "int", "symmetric": True, **weights}
    setting(weights, "type", str, among=("float",) if own == FLOAT else ("int",))
    return {**group, "format": own, "weights": weights}


def _named(target: str, name: str) -> bool:
    return target == name


def _matched(target: str, name: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target[3:], name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"target '{target}' is no regular expression ({error})") from None


def _classed(target: str, name: str) -> bool:  # noqa: ARG001 - one signature for all three
    return target == "Linear"
