"""Recipes: a method as data. Named stages with options and targets, checked whole before any work starts.

    name: gptq-w4
    stages:
      weights:    [{name: gptq, targets: [linears], options: {bits: 4, group_size: 32}}]
      embeddings: [{name: rtn, targets: [embedding, head], options: {bits: 8}}]

`targets` are words (`linears`, `embedding`, `head`) or patterns on module names (`model.layers.0.*`, `*.down_proj`);
the first entry that matches a tensor has it, and a target that matches nothing is an error. The method `float` keeps a
tensor as it is. Transforms go over whole blocks, in order; which linears, where they choose, is an option of theirs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from anybit.errors import RecipeError, nearest
from anybit.formats.form import Form
from anybit.layers.inputs import Op
from anybit.methods.abq import ABQ
from anybit.methods.activations import ActivationMethod, FloatInputs, IntInputs
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.anybcq import AnyBCQ
from anybit.methods.awq import AWQ
from anybit.methods.base import Method
from anybit.methods.bipolar import BipolarInputs, BipolarRTN
from anybit.methods.flexq import FlexQInputs
from anybit.methods.float_rtn import FloatRTN
from anybit.methods.gptq import GPTQ
from anybit.methods.grid import AffineGrid
from anybit.methods.nested import Nested
from anybit.methods.rtn import RTN, SymmetricRTN
from anybit.methods.tender import TenderInputs
from anybit.methods.tune_tables import TuneTables
from anybit.transforms.awq_scale import AWQScale
from anybit.transforms.base import Transform
from anybit.transforms.hadamard import Hadamard
from anybit.transforms.reorder import Reorder
from anybit.transforms.rotate import Rotate
from anybit.transforms.shift import Shift
from anybit.transforms.smooth import Smooth
from anybit.transforms.smooth_attention import SmoothAttention

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "any-precision": AnyPrecision,
    "anybcq": AnyBCQ,
    "nested": Nested,
    "float-rtn": FloatRTN,
    "rtn-symmetric": SymmetricRTN,
    "bipolar": BipolarRTN,
}
TRANSFORMS: dict[str, type[Transform]] = {
    "awq-scale": AWQScale,
    "smooth": Smooth,
    "hadamard": Hadamard,
    "rotate": Rotate,
    "reorder": Reorder,
    "smooth-attention": SmoothAttention,
    "shift": Shift,
}
COMPENSATIONS: dict[str, type[TuneTables]] = {"tune-tables": TuneTables}
LEARNERS: dict[str, type[ABQ]] = {"abq": ABQ}
ACTIVATIONS: dict[str, type[ActivationMethod]] = {
    "int": IntInputs,
    "fp": FloatInputs,
    "flexq": FlexQInputs,
    "bipolar": BipolarInputs,
    "tender": TenderInputs,
}
KEEP = "float"
WORDS = ("linears", "embedding", "head")
StageName = Literal["transform", "learn", "weights", "activations", "compensate", "embeddings"]


class Entry(BaseModel):
    """One step of a stage: which method, on what, with which options."""

    model_config = ConfigDict(extra="forbid")
    name: str
    targets: list[str] = ["linears"]
    options: dict[str, Any] = {}


class Recipe(BaseModel):
    """A recipe file. `weights`, `activations`, `kv` and `needs` describe it to people; `stages` is what runs."""

    model_config = ConfigDict(extra="forbid")
    name: str
    paper: str
    summary: str
    weights: str
    activations: str = "float"
    kv: str = "float"
    needs: list[str] = []
    stages: dict[StageName, list[Entry]]


@dataclass(frozen=True)
class Assignment:
    """What will happen to a model: transforms and compensations for every block, a method (None: keep float) per module name, and
    a quantizer of its input for every linear that has one."""

    transforms: tuple[Transform, ...]
    methods: Mapping[str, Method | None]
    compensations: tuple[TuneTables, ...] = ()
    activations: Mapping[str, ActivationMethod] = field(default_factory=dict)
    learners: tuple[ABQ, ...] = ()
    linears: frozenset[str] = frozenset()

    def ops(self, name: str, columns: int) -> list[Op]:
        """What the layer `name` with so many inputs does to its input first; nothing but the blocks' linears has any."""
        return [op for found in self.transforms for op in found.inputs(name, columns)] if name in self.linears else []


def list_recipes() -> list[dict[str, Any]]:
    """All built-in recipes, by name, without their stages."""
    found = [_parse(path.read_text(), path.name) for path in _builtin() if path.name.endswith(".yaml")]
    return [recipe.model_dump(exclude={"stages"}) for recipe in sorted(found, key=lambda r: r.name)]


def show_recipe(name: str) -> dict[str, Any]:
    """One recipe in full. Raises RecipeError for an unknown name."""
    return load_recipe(name).model_dump()


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name or a YAML file by path, with `stage.option=value` overrides applied.

    An override goes to the first entry of its stage; `stage.name=method` exchanges the method itself.

    Raises:
        RecipeError: unknown name, file that does not parse, or an override that fits nothing.
    """
    builtin = {path.name.removesuffix(".yaml"): path for path in _builtin() if path.name.endswith(".yaml")}
    path = Path(name)
    if name in builtin:
        recipe = _parse(builtin[name].read_text(), name)
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"recipe file {name} does not exist")
        recipe = _parse(path.read_text(), name)
    else:
        raise RecipeError(f"unknown recipe '{name}'{nearest(name, builtin)}")
    for override in overrides:
        _override(recipe, override)
    return recipe


def assign(recipe: Recipe, linears: Sequence[str], embedding: str, head: str, tied: bool) -> Assignment:
    """Methods for every tensor of a model, with all problems of the recipe reported at once.

    Raises:
        RecipeError: unknown methods, options out of range, targets that match nothing, tensors that no entry covers.
    """
    problems: list[str] = []
    transforms = [_build(entry, TRANSFORMS, "transform", problems) for entry in recipe.stages.get("transform", [])]
    tunings = [_build(entry, COMPENSATIONS, "compensate", problems) for entry in recipe.stages.get("compensate", [])]
    learners = [_build(entry, LEARNERS, "learn", problems) for entry in recipe.stages.get("learn", [])]
    ends = [embedding] if tied else [embedding, head]
    words = {"linears": list(linears), "embedding": [embedding], "head": ends[-1:]}
    methods: dict[str, Method | None] = _matched(recipe, "weights", list(linears), METHODS, words, problems)
    methods |= _matched(recipe, "embeddings", ends, METHODS, words, problems)
    inputs = _matched(recipe, "activations", list(linears), ACTIVATIONS, words, problems)
    lost = [name for name in inputs if name in methods and methods[name] is None and inputs[name]]
    if lost:
        problems.append(f"activations: {lost[0]} keeps float weights, so its input cannot be quantized; leave it out")
    missing = [name for name in linears if name not in methods]
    if missing:
        problems.append(
            f"weights: no entry covers {missing[0]} ({len(missing)} in all); add a target, or name: float to keep it"
        )
    if any(isinstance(found, Rotate) for found in transforms[1:]):
        problems.append("transform: rotate comes once and first, since the others measure the stream it turns")
    if transforms and any(method is not None and method.gradients for method in methods.values()):
        problems.append("weights: gradients are those of the untransformed model; drop the transform, or use hessian")
    if learners and any(m is not None and not isinstance(m, AffineGrid) for n, m in methods.items() if n in linears):
        problems.append("learn: 'abq' learns for affine grids; use rtn or gptq for weights")
    if problems:
        raise RecipeError(f"recipe '{recipe.name}': " + "; ".join(dict.fromkeys(problems)))
    inputs = {name: found for name, found in inputs.items() if found}
    every = {name: methods.get(name) for name in [*linears, *ends]}
    return Assignment(tuple(transforms), every, tuple(tunings), inputs, tuple(learners), frozenset(linears))


def check_inputs(assignment: Assignment, columns: Mapping[str, int]) -> None:
    """Raise RecipeError for a linear whose input changes at run time while its layer stays float, which cannot, and for a
    transform of inputs that chooses none; `columns`: how many inputs every module has."""
    for found in assignment.transforms:
        if isinstance(found, Hadamard) and not any(found.inputs(name, columns[name]) for name in assignment.linears):
            raise RecipeError(f"transform: hadamard.linears {list(found.linears)} matches no linear of this model")
    for name, method in assignment.methods.items():
        if method is None and (ops := assignment.ops(name, columns[name])):
            raise RecipeError(
                f"transform: {ops[0]['op']} changes the input of {name}, which keeps float weights; leave it out"
            )


def planned_form(assignment: Assignment, name: str, shape: tuple[int, int]) -> Form:
    """The form that the tensor `name` of `shape` (N, K) will have, known before any work; it has a method."""
    method, inputs = assignment.methods[name], assignment.activations.get(name)
    assert method is not None
    ops = assignment.ops(name, shape[1])
    form = method.plan(shape) | ({"inputs": ops} if ops else {})
    return form | ({} if inputs is None else {"activations": inputs.spec().form()})


def _matched(
    recipe: Recipe,
    stage: StageName,
    names: list[str],
    table: Mapping[str, Any],
    words: Mapping[str, list[str]],
    problems: list[str],
) -> dict[str, Any]:
    """What the entries of `stage` say of `names`: the first that matches has it, None keeps float."""
    found: dict[str, Any] = {}
    for entry in recipe.stages.get(stage, []):
        method = None if entry.name == KEEP else _build(entry, table, stage, problems)
        for target in entry.targets:
            chosen = words[target] if target in words else fnmatch.filter(names, target)
            matched = [name for name in chosen if name in names]
            if not matched:
                known = [*(word for word in WORDS if set(names).intersection(words[word])), *names]
                problems.append(f"{stage}: target '{target}' matches nothing{nearest(target, known[:400])}")
            for name in matched:
                found.setdefault(name, method)
    return found


def _build(entry: Entry, table: Mapping[str, Any], stage: str, problems: list[str]) -> Any:
    """The method of an entry with its options checked; None, with the reasons added to `problems`, when it does not
    fit."""
    if entry.name not in table:
        problems.append(f"{stage}: unknown method '{entry.name}'{nearest(entry.name, [*table, KEEP])}")
        return None
    try:
        return table[entry.name](**entry.options)
    except ValidationError as error:
        for issue in error.errors():
            option = str(issue["loc"][0]) if issue["loc"] else ""
            hint = nearest(option, table[entry.name].model_fields) if issue["type"] == "extra_forbidden" else ""
            text = "unknown option" if issue["type"] == "extra_forbidden" else issue["msg"]
            problems.append(f"{stage}.{option}: {text}{hint}")
        return None


def _override(recipe: Recipe, override: str) -> None:
    path, equals, value = override.partition("=")
    stage, dot, option = path.partition(".")
    if not (equals and dot and option):
        raise RecipeError(f"--set {override}: write stage.option=value, such as weights.bits=3")
    if stage not in recipe.stages or not recipe.stages[stage]:
        raise RecipeError(
            f"--set {override}: recipe '{recipe.name}' has no stage '{stage}'{nearest(stage, recipe.stages)}"
        )
    entry = recipe.stages[stage][0]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: '{value}' is not a YAML value") from None
    if option == "name":
        entry.name, entry.options = str(parsed), {}
    else:
        entry.options[option] = parsed


def _parse(text: str, where: str) -> Recipe:
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where} is not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        issues = [f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in error.errors()]
        raise RecipeError(f"recipe {where}: " + "; ".join(issues)) from None


def _builtin() -> list[Any]:
    return sorted(resources.files("anybit.recipes").iterdir(), key=lambda path: path.name)
