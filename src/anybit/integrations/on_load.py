"""Quantize a float model while transformers loads it: tensor by tensor, by recipes that look at nothing but the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from anybit.blocks import Quantized, quantize_table, with_inputs
from anybit.checkpoint.ledger import Ledger, Row
from anybit.errors import RecipeError
from anybit.formats.activation import restore_activations
from anybit.formats.decoder import Form
from anybit.job import assign_forms, sizes
from anybit.methods.base import InputStats
from anybit.methods.flexq import FlexQInputs
from anybit.models.structure import Structure
from anybit.recipe import Assignment, Recipe, load_recipe


@dataclass(frozen=True)
class OnLoad:
    """A recipe matched with a model without weights: what becomes of each weight, and the ledger rows so far."""

    recipe: Recipe
    assignment: Assignment
    forms: dict[str, Form]
    sizes: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def plan(cls, model: Any, structure: Structure, recipe: str, overrides: Sequence[str]) -> OnLoad:
        """Raises RecipeError for recipes that need calibration, and for what `anybit.recipe` refuses."""
        chosen = load_recipe(recipe, overrides)
        assignment, forms = assign_forms(model, structure, chosen)
        if reason := wants_calibration(assignment, forms):
            raise RecipeError(
                f"recipe '{chosen.name}' cannot quantize a model as it loads: {reason}; use `anybit quantize`, or a recipe "
                "such as rtn-w4"
            )
        return cls(chosen, assignment, forms, sizes(model, forms, model.dtype.itemsize))

    def ledger(self, model: str) -> Ledger:
        """The account once everything is loaded; what stayed float is not in it yet."""
        identity = {"model": {"name": model}, "recipe": self.recipe.model_dump(), "data": None}
        rows = [self.rows[name] for name in self.forms]
        return Ledger(
            model=model, recipe=self.recipe.name, identity=identity, tensors=rows, float_tensors={}, **self.sizes
        )

    def expect_float(self, model: nn.Module) -> None:
        """Declare the weights of the new layers as float32 [N, K], so that nothing is cast on its way into `convert`."""
        for name, form in self.forms.items():
            weight = nn.Parameter(torch.empty(form["shape"], dtype=torch.float32), requires_grad=False)
            model.get_submodule(name).register_parameter("weight", weight)

    def operation(self) -> ConversionOps:
        """For transformers' loader, one for each weight."""
        return _Quantize(self)

    def quantize(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Tensors of the layer `name` from its float weight [N, K], by name in the layer."""
        method = self.assignment.methods[name]
        assert method is not None
        found: Quantized = with_inputs(quantize_table(name, weight, method), self.assignment, InputStats(name=name))
        self.rows[name] = found.row
        return found.tensors


class _Quantize(ConversionOps):
    def __init__(self, on_load: OnLoad) -> None:
        self._on_load = on_load

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{name of the float weight: it, in a list or not} to the tensors of the layer, by full name."""
        value = next(iter(input_dict.values()))
        name = str(kwargs["full_layer_name"]).removesuffix(".weight")
        tensors = self._on_load.quantize(name, value[0] if isinstance(value, list) else value)
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def wants_calibration(assignment: Assignment, forms: Mapping[str, Form]) -> str:
    """Why a recipe has to see text or whole blocks; empty when the weights alone are enough."""
    for stage, steps in (
        ("transform", assignment.transforms),
        ("learn", assignment.learners),
        ("compensate", assignment.compensations),
    ):
        if steps:
            return f"{stage} '{steps[0].name}' works on whole blocks"
    for name, method in assignment.methods.items():
        if method is not None and (method.needs or method.gradients):
            return f"method '{method.name}' of {name} needs calibration"
        if method is not None and method.undecided:
            return f"the form of {name} depends on its weight"
    for name, inputs in assignment.activations.items():
        if isinstance(inputs, FlexQInputs):
            return f"the widths of the input of {name} are measured on text"
        spec = restore_activations(forms[name])
        if inputs.needs or (spec is not None and spec.specs(forms[name]["shape"][1])):
            return f"the input scales of {name} need calibration"
    return ""
