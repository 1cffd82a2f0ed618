"""What a quantization will do, decided before any work: model, structure, methods, sizes, memory; shared by quantize
and plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.checkpoint.ledger import LEDGER, Ledger, form_word
from anybit.errors import InputError, PromiseError
from anybit.formats.decoder import Form
from anybit.formats.kv import check_head
from anybit.formats.terms import bits_per_weight, stored_bits
from anybit.memory import peak_rss_bytes, rss_bytes
from anybit.models.source import ModelSource, open_model
from anybit.models.structure import Structure, find_structure
from anybit.recipe import Assignment, Recipe, assign, check_inputs, load_recipe, planned_form
from anybit.transforms.rotate import Ends, Rotate, is_centred

GATE_ROWS = 8  # linears with fewer outputs are gates (Qwen-MoE's shared expert): nothing to gain, much to lose
FLOAT = 4
MOST_SAMPLES = 4
GRADIENT_COPIES = 4  # activations a backward pass keeps, relative to the inputs of linears
HESSIAN_COPIES = 5  # H, its ordered copy, the flipped and the factored one, U


@dataclass(frozen=True)
class Job:
    """A model opened, understood and matched with a recipe.

    `model` has no weights yet; `forms` holds the planned form of every tensor that will be quantized, by module name;
    `notes` says what was decided of it before the work (`decide.py`). `rotation`: of the residual stream, if the recipe has
    one; `untied`: head and embedding shared a table in the source.
    """

    source: ModelSource
    model: nn.Module
    structure: Structure
    recipe: Recipe
    assignment: Assignment
    forms: dict[str, Form]
    rotation: Ends | None = None
    untied: bool = False
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that stay float: the source's own, float32 where its config names none."""
        return self.source.config.dtype if isinstance(self.source.config.dtype, torch.dtype) else torch.float32

    def changes(self) -> dict[str, Any]:
        """What config.json says otherwise than the source's."""
        return {"tie_word_embeddings": False} if self.untied else {}

    def gradients(self) -> dict[str, list[str]]:
        """By block, the linears whose method reads gradients; empty when none does."""
        found = {
            block: [
                name
                for name, method in self.assignment.methods.items()
                if method is not None and method.gradients and name.startswith(f"{block}.")
            ]
            for block in self.structure.blocks
        }
        return {block: names for block, names in found.items() if names}

    def sizes(self) -> dict[str, Any]:
        """`size_bytes` of all tensors, `float_bytes` they take now, `bits_per_weight` over the model; exact, before
        any work."""
        head = f"{self.structure.head}.weight"
        return sizes(
            self.model, self.forms, self.dtype.itemsize, self.model.get_parameter(head).numel() if self.untied else 0
        )

    def cache(self) -> dict[str, Any]:
        """How keys and values are to be cached, for the ledger; empty where the recipe does not say."""
        kv = self.assignment.kv
        return kv.account(self.structure.geometry.head_dim) if kv else {}

    def peak_bytes(self, samples_in_flight: int, seq_len: int) -> int:
        """Estimated peak resident memory: the process now, one block, its statistics, the inputs of a few samples."""
        blocks = [self.model.get_submodule(name) for name in self.structure.blocks]
        block = max(sum(p.numel() for p in b.parameters()) for b in blocks) * FLOAT
        widest = max((m.in_features for m in blocks[0].modules() if isinstance(m, nn.Linear)), default=0)
        inputs = sum(m.in_features for m in blocks[0].modules() if isinstance(m, nn.Linear))
        table = self.model.get_parameter(f"{self.structure.embedding}.weight").numel() * (FLOAT if self.rotation else 2)
        activations = samples_in_flight * seq_len * inputs * FLOAT
        steps = max(table, 2 * block + HESSIAN_COPIES * widest**2 * FLOAT + activations)
        if (
            self.assignment.learners
        ):  # the float block, the learned weights, their gradients; what a backward pass keeps
            heads = self.structure.geometry.heads
            kept = GRADIENT_COPIES * (seq_len * inputs + heads * seq_len**2) * FLOAT
            steps = max(steps, 5 * block + samples_in_flight * kept)
        if self.gradients():  # the whole model, its squared gradients, and per sequence gradients and activations
            whole = sum(p.numel() for p in self.model.parameters()) * FLOAT
            kept = GRADIENT_COPIES * seq_len * (inputs * len(blocks) + self.structure.geometry.vocab) * FLOAT
            steps = max(steps, 2 * whole + samples_in_flight * (whole + kept))
        return rss_bytes() + steps

    def summary(self, ledger: Ledger, out: str, seconds: float) -> dict[str, Any]:
        """What `anybit quantize` tells: sizes in bytes, bits per weight over the model, peak memory."""
        return {
            "model": self.source.name,
            "recipe": self.recipe.name,
            "bits_per_weight": ledger.bits_per_weight,
            "size_bytes": ledger.size_bytes,
            "float_bytes": ledger.float_bytes,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "layers": len(ledger.tensors),
            "ledger": str(Path(out) / LEDGER),
            "out": out,
        }

    def layers(self) -> list[dict[str, Any]]:
        """The plan tensor by tensor."""
        return [
            {"name": name, "form": form_word(form), "shape": form["shape"], "bits_per_weight": bits_per_weight(form)}
            for name, form in self.forms.items()
        ]


def open_job(model: str, recipe: str, overrides: Sequence[str] = ()) -> Job:
    """Open and match; every problem with the model or the recipe shows here, before any work.

    Raises:
        InputError: the model cannot be read. StructureError: it is not understood. RecipeError: the recipe does not
        fit.
    """
    return match_job(open_model(model), load_recipe(recipe, overrides))


def match_job(source: ModelSource, chosen: Recipe) -> Job:
    """The job of an open model and a loaded recipe. Raises as `open_job`."""
    skeleton = source.skeleton()
    structure = find_structure(skeleton)
    rotated, untied = any(entry.name == Rotate.name for entry in chosen.stages.get("transform", [])), False
    if rotated and structure.tied:
        structure, untied = untie(skeleton, structure), True
    assignment, forms = assign_forms(skeleton, structure, chosen)
    rotation = _rotation(assignment, skeleton, structure) if rotated else None
    return Job(source, skeleton, structure, chosen, assignment, forms, rotation, untied)


def assign_forms(model: nn.Module, structure: Structure, chosen: Recipe) -> tuple[Assignment, dict[str, Form]]:
    """What `chosen` does with each tensor of a model without weights, and the form each will have, by module name."""
    linears = tuple(
        f"{block}.{name}"
        for block in structure.blocks
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and module.out_features >= GATE_ROWS
    )
    assignment = assign(chosen, linears, structure.embedding, structure.head, structure.tied)
    if assignment.kv:
        check_head(assignment.kv, structure.geometry.head_dim)
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in assignment.methods}
    forms = {
        name: planned_form(assignment, name, (shapes[name][0], shapes[name][1]))
        for name, method in assignment.methods.items()
        if method
    }
    check_inputs(assignment, {name: shape[1] for name, shape in shapes.items()})
    return assignment, forms


def sizes(model: nn.Module, forms: Mapping[str, Form], itemsize: int, twice: int = 0) -> dict[str, Any]:
    """`Job.sizes` of a model without weights; `itemsize` bytes a number that stays float, `twice` weights that were one in the
    source."""
    owned = dict(model.named_parameters())  # without the duplicates of tied parameters
    kept = sum(p.numel() for name, p in owned.items() if name.removesuffix(".weight") not in forms) * itemsize
    size = kept + sum(stored_bits(form) for form in forms.values()) // 8
    weights = sum(p.numel() for p in owned.values()) - twice
    return {"size_bytes": size, "float_bytes": weights * itemsize, "bits_per_weight": 8 * size / weights}


def untie(model: nn.Module, structure: Structure) -> Structure:
    """Give the head of a model without weights a table of its own."""
    head = model.get_submodule(structure.head)
    head.weight = nn.Parameter(torch.empty_like(head.get_parameter("weight")), requires_grad=False)
    return replace(structure, tied=False)


def _rotation(assignment: Assignment, model: nn.Module, structure: Structure) -> Ends:
    rotate = next(found for found in assignment.transforms if isinstance(found, Rotate))
    width = structure.geometry.hidden
    return Ends(rotate.stream(width, is_centred(model, width)))


def plan(
    model: str, *, recipe: str, overrides: Sequence[str] = (), samples: int = 32, seq_len: int = 512
) -> dict[str, Any]:
    """What quantizing would give, without doing it: exact size, estimated memory. What cannot be known is None, never
    guessed."""
    job = open_job(model, recipe, overrides)
    sizes = job.sizes()
    predicted = {
        "size_bytes": sizes["size_bytes"],
        "peak_rss_bytes": job.peak_bytes(min(samples, MOST_SAMPLES), seq_len),
        "seconds": None,
        "kl": None,
        "tokens_per_second": None,
    }
    return {
        "model": model,
        "choice": job.recipe.name,
        "predicted": predicted,
        "float_bytes": sizes["float_bytes"],
        "bits_per_weight": sizes["bits_per_weight"],
        "layers": job.layers(),
    }


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `3g` or plain bytes as a number. Raises InputError when it is none of these."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if not found:
        raise InputError(f"--max-ram {text}: write a size such as 8GiB or 500MB")
    base = 1024 if found[3] or (found[2] and not text.lower().strip().endswith("b")) else 1000
    return int(float(found[1]) * base ** " kmgt".index(found[2] or " "))


def samples_in_flight(job: Job, limit: int | None, seq_len: int) -> int:
    """How many calibration samples may have their inputs in memory at once: fewer than `MOST_SAMPLES` to stay below `limit`.

    Raises:
        PromiseError: not even one is expected to fit.
    """
    if limit is None:
        return MOST_SAMPLES
    fitting = [count for count in range(MOST_SAMPLES, 0, -1) if job.peak_bytes(count, seq_len) <= limit]
    if not fitting:
        raise PromiseError(
            f"--max-ram {limit / 2**30:.2f}GiB is less than the {job.peak_bytes(1, seq_len) / 2**30:.2f}GiB this model "
            f"needs block "
            "by block; raise it, or lower --seq-len"
        )
    return fitting[0]
