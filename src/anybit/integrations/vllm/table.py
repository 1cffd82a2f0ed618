"""A quantized embedding table of vLLM, divided over workers by rows, and the output head that reads it too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from anybit.errors import FormatError
from anybit.formats.form import Form
from anybit.formats.terms import save_terms
from anybit.integrations.vllm import op
from anybit.integrations.vllm.linear import route
from anybit.integrations.vllm.multiply import multiplier
from anybit.integrations.vllm.op import Layer
from anybit.integrations.vllm.part import Part
from anybit.integrations.vllm.policy import Widths
from anybit.layers.embedding import QuantEmbedding


class AnybitTable(QuantizeMethodBase):
    """Rows of a table [V, H], and x [T, H] times all of them."""

    def __init__(self, name: str, form: Form, widths: Widths) -> None:
        self._name, self._form, self._widths = name, form, widths

    def create_weights(self, layer: Layer, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """A part with this worker's rows. Raises FormatError for a vocabulary of another size."""
        if list(self._form["shape"]) != [layer.org_vocab_size, layer.embedding_dim]:
            raise FormatError(
                f"{self._name} is {self._form['shape']} in the checkpoint and "
                f"{[layer.org_vocab_size, layer.embedding_dim]} in the model"
            )
        indices = layer.shard_indices
        rows = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        layer.anybit_dtype = params_dtype
        route(layer, [Part(self._name, self._form, rows, (0, layer.embedding_dim))])

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Make the table and the product with it."""
        shard = layer.anybit_parts[0].finished()
        layer.anybit_parts = ()
        form, tensors = save_terms(shard.terms, (shard.rows, layer.embedding_dim))
        table = QuantEmbedding(form)
        table.fill(tensors)
        table.dtype_of_output = torch.empty(0, dtype=layer.anybit_dtype)
        layer.anybit_rows = (table,)  # in a tuple: its tensors are no parameters of the model
        layer.anybit_product = multiplier([shard], self._widths, layer.weight.device, layer.anybit_dtype)
        layer.anybit_padding = layer.num_embeddings_per_partition - shard.rows

    def embedding(self, layer: Layer, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., H]."""
        return op.rows(layer, ids)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, H] -> logits [T, V of this worker], 0 for the rows that only fill up."""
        logits = nn.functional.pad(op.multiply(layer, x), (0, layer.anybit_padding))
        return logits if bias is None else logits + bias


class TiedHead(QuantizeMethodBase):
    """The head of a model that shares the table of its embedding; it owns nothing."""

    def create_weights(self, layer: Layer, *sizes: Any, **extra: Any) -> None:
        """Nothing of its own."""

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        """Read that table from now on."""
        layer.weight = embed_tokens.weight
        layer.anybit_table = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Raise FormatError when the model never tied it."""
        if not hasattr(layer, "anybit_table"):
            raise FormatError(
                "config.json says that the head shares the embedding's table, but this model does not tie them"
            )

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, H] -> logits."""
        (table,) = layer.anybit_table
        logits: Tensor = table.quant_method.apply(table, x, bias)
        return logits
