"""A linear layer of vLLM: one of ours, or several that vLLM fuses (query-key-value, gate-up), divided over workers.

Parameters are empty; they only route the checkpoint's tensors to our parts, which cut what this worker needs. Parts that are
written alike become one weight, others run one after the other, so fused layers may mix forms.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearMethodBase

from anybit.errors import FormatError
from anybit.formats.form import Form
from anybit.formats.terms import tensor_specs
from anybit.integrations.vllm import op
from anybit.integrations.vllm.multiply import multiplier
from anybit.integrations.vllm.op import Layer
from anybit.integrations.vllm.part import Part, joined, own_share
from anybit.integrations.vllm.policy import Widths
from anybit.integrations.vllm.threads import use_given_cores

QKV = {"q": 0, "k": 1, "v": 2}


class AnybitLinear(LinearMethodBase):
    """y = x W^T (+ bias) from planes."""

    def __init__(self, forms: dict[str, Form], widths: Widths) -> None:
        self._forms, self._widths = forms, widths

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Parts for this worker's rows and columns. Raises FormatError where the model and the checkpoint differ in shape."""
        if len(output_partition_sizes) != len(self._forms):
            raise FormatError(
                f"{', '.join(self._forms)}: {len(self._forms)} layers of the checkpoint for a layer of "
                f"{len(output_partition_sizes)} parts; this plugin cannot divide a layer that was saved fused"
            )
        workers = int(getattr(layer, "tp_size", 1))
        rank = get_tensor_model_parallel_rank() if workers > 1 else 0
        parts = []
        for (name, form), mine in zip(self._forms.items(), output_partition_sizes, strict=True):
            rows = own_share(name, form["shape"][0], mine, rank, workers)
            columns = own_share(name, form["shape"][1], input_size_per_partition, rank, workers)
            parts.append(Part(name, form, rows, columns))
        layer.anybit_dtype = params_dtype
        route(layer, parts)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Make the product and let go of what was loaded."""
        use_given_cores()
        shards = joined([part.finished() for part in layer.anybit_parts])
        layer.anybit_product = multiplier(shards, self._widths, layer.weight.device, layer.anybit_dtype)
        layer.anybit_parts = ()

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]."""
        y = op.multiply(layer, x)
        return y if bias is None else y + bias


def route(layer: Layer, parts: list[Part]) -> None:
    """Give the layer an empty parameter for every tensor name, whose loader hands tensors to the parts; name it for `op`."""
    layer.anybit_parts = tuple(parts)
    for name, (_, dtype) in {key: spec for part in parts for key, spec in tensor_specs(part.form).items()}.items():
        parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = partial(_load, parts, name)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    op.name(layer, parts[0].name, sum(part.rows[1] - part.rows[0] for part in parts))


def _load(parts: list[Part], name: str, _: Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
    """Called by vLLM with a tensor of the checkpoint; `shard` says which part of a fused layer, here or on the tensor."""
    shard = getattr(tensor, "shard_id", None) if shard is None else shard
    index = 0 if shard is None else QKV[shard] if isinstance(shard, str) else shard
    parts[index].load(name, tensor)
