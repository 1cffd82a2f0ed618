"""Our layers as operators that a compiler does not look into.

A graph that vLLM compiled is never traced again: it must not hold a precision, which changes between passes, nor kernels that
choose by the number of tokens. So it holds the layer's name, found again at run time as vLLM finds its attention layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context

from anybit.errors import FormatError

Layer = Any
"""A module of vLLM; ours are the attributes `anybit_*`."""


def name(layer: Layer, called: str, outputs: int) -> None:
    """Make the layer known under its name in the checkpoint. Raises FormatError when two have the same."""
    known = get_current_vllm_config().compilation_config.static_forward_context
    if called in known:
        raise FormatError(f"two layers of the model are called '{called}'")
    known[called] = layer
    layer.anybit_name, layer.anybit_outputs = called, outputs


def multiply(layer: Layer, x: Tensor) -> Tensor:
    """x [..., K] -> [..., outputs] in the dtype of x."""
    if torch.compiler.is_compiling():
        return multiply_op(x, layer.anybit_name, layer.anybit_outputs)
    y: Tensor = layer.anybit_product(x)
    return y


def rows(layer: Layer, ids: Tensor) -> Tensor:
    """ids int [...] -> [..., H] in the dtype of the model."""
    if torch.compiler.is_compiling():
        return rows_op(ids, layer.anybit_name, layer.embedding_dim, layer.anybit_dtype)
    found: Tensor = layer.anybit_rows[0](ids)
    return found


def _multiply(x: Tensor, called: str, outputs: int) -> Tensor:  # noqa: ARG001 (the fake needs it)
    y: Tensor = get_forward_context().no_compile_layers[called].anybit_product(x)
    return y


def _rows(ids: Tensor, called: str, width: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    found: Tensor = get_forward_context().no_compile_layers[called].anybit_rows[0](ids)
    return found


multiply_op = torch.library.custom_op("anybit::vllm_multiply", _multiply, mutates_args=())
rows_op = torch.library.custom_op("anybit::vllm_rows", _rows, mutates_args=())


@multiply_op.register_fake
def _(x: Tensor, called: str, outputs: int) -> Tensor:  # noqa: ARG001 (the names are the schema's)
    return x.new_empty(*x.shape[:-1], outputs)


@rows_op.register_fake
def _(ids: Tensor, called: str, width: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return ids.new_empty(*ids.shape, width, dtype=dtype)
