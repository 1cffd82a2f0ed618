"""anybit -> ONNX: `model.onnx`, one decoding step with its cache as inputs and outputs, beside config.json and tokenizer.

    input_ids int64 [B, T], attention_mask int64 [B, P + T], position_ids int64 [B, T],
    past_key_values.{i}.key / .value float32 [B, kv_heads, P, head_dim]
    -> logits float32 [B, T, V], present.{i}.key / .value float32 [B, kv_heads, P + T, head_dim]

Those are the names that Optimum and transformers.js give such a graph; P may be 0. PyTorch's own exporter traces the model as
transformers builds it, so any architecture that it can trace will do.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.progress import Progress
from anybit.checkpoint.finish import copy_companions
from anybit.checkpoint.partial import write_json
from anybit.errors import InputError
from anybit.integrations.exchange.account import Account
from anybit.integrations.exchange.checkpoint import Checkpoint
from anybit.integrations.exchange.rules import check_layer, lose_cache
from anybit.integrations.onnx.layers import PackedEmbedding, PackedLinear
from anybit.layers.swap import embedding_scale
from anybit.models.skeleton import empty_model

FILE = "model.onnx"
HINT = "pip install 'anybit[export]'"


def write(source: Checkpoint, root: Path, account: Account, progress: Progress) -> None:
    """The graph with its weights in `model.onnx.data`. The packed weights are in memory as a whole: PyTorch traces a model."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX export needs the package {error.name}; {HINT}") from None
    lose_cache(source, account)
    model = packed_model(source, account, progress)
    _trace(model, root / FILE)
    copy_companions(source.directory, root)
    write_json(root / "config.json", {k: v for k, v in source.config.items() if k != "quantization_config"})
    account.note(
        "one decoding step with key and value caches in float32; MatMulNBits in float32 (accuracy_level unset)"
    )
    account.note("MatMulNBits is onnxruntime's own operator (domain com.microsoft): other runtimes may not have it")


def packed_model(source: Checkpoint, account: Account, progress: Progress) -> nn.Module:
    """The float32 model of transformers with packed layers in place of quantized ones, all weights loaded."""
    model = empty_model(source.model_config)
    top: Any = model
    embedding, head = top.get_input_embeddings(), top.get_output_embeddings()
    tied = head.weight is embedding.weight
    shards = list(source.shards())
    for number, (layers, kept) in enumerate(shards):
        progress("pack", number, len(shards))
        for name in kept:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(source.tensor(name).float(), requires_grad=False)
            model.get_submodule(owner).register_parameter(leaf, value)
        for name in layers:
            check_layer(name, source.forms[name], account)
            grid, old = source.layer(name).grid(account), model.get_submodule(name)
            if isinstance(old, nn.Embedding):
                model.set_submodule(name, PackedEmbedding(grid, embedding_scale(old)))
                if tied:
                    model.set_submodule(source.head, PackedLinear(grid, None, account, source.head))
            else:
                bias = source.tensor(f"{name}.bias").float() if f"{name}.bias" in source.files else None
                model.set_submodule(name, PackedLinear(grid, bias, account, name))
    if tied and isinstance(model.get_submodule(source.head), nn.Linear):
        model.get_submodule(source.head).register_parameter("weight", top.get_input_embeddings().weight)
    progress("pack", len(shards), len(shards))
    return model


class Step(nn.Module):
    """The traced function: one step with an explicit cache."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """`past`: key and value of every layer in turn; returns logits, then the same with the new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index in range(self.layers):
            cache.update(past[2 * index], past[2 * index + 1], index)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(**inputs, past_key_values=cache, use_cache=True)
        present: list[Tensor] = []
        for layer in out.past_key_values.layers:
            present += [layer.keys, layer.values]
        return (out.logits, *present)


def _trace(model: nn.Module, target: Path) -> None:
    top: Any = model
    config = top.config.get_text_config()
    layers = int(config.num_hidden_layers)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    batch, tokens, before = 2, 3, 5
    past = [torch.zeros(batch, kv_heads, before, head_dim) for _ in range(2 * layers)]
    ids = torch.ones(batch, tokens, dtype=torch.int64)
    mask = torch.ones(batch, before + tokens, dtype=torch.int64)
    places = (torch.arange(tokens) + before).expand(batch, -1)
    dim = torch.export.Dim.DYNAMIC
    shapes = ({0: dim, 1: dim}, {0: dim, 1: dim}, {0: dim, 1: dim}, [{0: dim, 2: dim}] * len(past))
    pairs = [(i, kind) for i in range(layers) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{kind}" for i, kind in pairs)]
    outputs = ["logits", *(f"present.{i}.{kind}" for i, kind in pairs)]
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            Step(model, layers).eval(),
            (ids, mask, places, past),
            target,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=True,
            opset_version=20,
            optimize=True,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages it did not find and of its own deprecations; failures come as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
