"""Put quantized layers where a model has float ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from anybit.errors import FormatError, StructureError
from anybit.formats.decoder import Form
from anybit.formats.form import precisions
from anybit.layers.embedding import QuantEmbedding, TiedHead
from anybit.layers.linear import QuantLinear, Terms
from anybit.layers.precision import Precision, available_precisions


def swap_layers(model: nn.Module, forms: Mapping[str, Form], tied: tuple[str, str] | None) -> None:
    """Replace each named float layer by an empty quantized one on the default device (wrap in `torch.device("meta")`).

    `forms` maps module names to forms; `tied` names (embedding, head) when they share one table, and then the head
    follows. All of them share one `Precision`, which becomes `model.precision`.

    Raises:
        FormatError: a form names a layer this model does not have, or one of another shape.
        StructureError: an embedding whose output is not just its table's rows. InputError: nested layers that have no
            precision in common.
    """
    modules = dict(model.named_modules())
    for name, form in forms.items():
        old = modules.get(name)
        if old is None:
            raise FormatError(f"the checkpoint has a quantized layer '{name}' that this model does not have")
        shape = tuple(old.weight.shape) if isinstance(getattr(old, "weight", None), nn.Parameter) else ()
        if shape != tuple(form["shape"]):
            raise FormatError(f"layer '{name}' is {list(shape)} in the model and {form['shape']} in the checkpoint")
        model.set_submodule(name, quantized(old, form))
    if tied is not None and tied[0] in forms:
        tie_head(model, *tied)
    precision = Precision(available_precisions(forms.values()))
    model.precision = precision  # type: ignore[assignment]  # the stubs of nn.Module know tensors and modules only
    for module in model.modules():
        if isinstance(module, Terms):
            module.precision = precision


def float_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """The way back: in place of every quantized layer a float one with the values its codes stand for, at the precision in use.

    Raises:
        FormatError: a layer that does more than a float one would: it changes its input, or scales the rows of a table, or reads
            it at two widths.
    """
    restored: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Terms):
            restored[module] = _float_layer(name, module, dtype)
        elif isinstance(module, TiedHead):
            head = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            head.weight = restored[module.table].get_parameter("weight")
            restored[module] = head
        else:
            continue
        model.set_submodule(name, restored[module])


def _float_layer(name: str, module: Terms, dtype: torch.dtype) -> nn.Module:
    form = module.form
    if changed := [part for part in ("inputs", "activations") if form.get(part)]:
        raise FormatError(f"'{name}' changes its input ({changed[0]}), which no float layer does; keep it quantized")
    weight = nn.Parameter(module.dense().to(dtype), requires_grad=False)
    rows, columns = form["shape"]
    if isinstance(module, QuantEmbedding):
        full = module.precision is None or module.precision.bits == module.precision.available[-1]
        if module.output_scale != 1 or not (full or len(precisions(form)) == 1):
            raise FormatError(f"'{name}' scales its rows or reads them at two widths; keep it quantized")
        return nn.Embedding(rows, columns, module.padding_idx, _weight=weight, _freeze=True)
    bias: nn.Parameter | None = getattr(module, "bias", None)
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.register_parameter("weight", weight)
    linear.register_parameter("bias", bias)
    return linear


def tie_head(model: nn.Module, embedding: str, head: str) -> None:
    """Make the head read the quantized table of the embedding.

    Raises:
        StructureError: the head adds a bias of its own, which a shared table does not carry.
    """
    if getattr(model.get_submodule(head), "bias", None) is not None:
        raise StructureError(
            f"the head '{head}' shares the embedding's table but has a bias; keep both in float (name: float)"
        )
    table = model.get_submodule(embedding)
    assert isinstance(table, QuantEmbedding)
    model.set_submodule(head, TiedHead(table))


def quantized(old: nn.Module, form: Form) -> Terms:
    """An empty quantized layer for a float Linear or Embedding."""
    if isinstance(old, nn.Embedding):
        return QuantEmbedding(form, embedding_scale(old), old.padding_idx)
    return QuantLinear(form, bias=getattr(old, "bias", None) is not None)


def embedding_scale(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by: 1, or the number a scaled embedding (Gemma) carries.

    Raises:
        StructureError: a subclass of nn.Embedding that does something this function does not know.
    """
    if type(embedding) is nn.Embedding:
        return 1.0
    for attribute in ("scalar_embed_scale", "embed_scale"):
        value = getattr(embedding, attribute, None)
        if isinstance(value, (int, float)):
            return float(value)
    raise StructureError(
        f"the embedding is a {type(embedding).__name__}, which does more than look up rows; keep it in float "
        "(--set embeddings.name=float)"
    )
