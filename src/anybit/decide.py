"""What a recipe leaves to the model, decided before the work: number types that rows vote for, layers that need wider
activations. Afterwards every tensor's form is fixed, and the ledger's notes say why."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from anybit.calibration.parallel import Workers
from anybit.job import Job
from anybit.methods.activations import ActivationMethod, IntInputs
from anybit.methods.base import Method
from anybit.methods.flexq import FlexQInputs, layer_type
from anybit.recipe import Assignment, planned_form
from anybit.sensitivity import losses

TOKENS = 256  # of each sample are measured on


def decided(job: Job, tokens: Tensor, pool: Workers) -> Job:
    """`job` with nothing left open; tokens int64 [samples, T] are those of the calibration."""
    methods, notes = _types(job)
    inputs, reasons = _widths(job, tokens, pool)
    for name, reason in reasons.items():
        notes[name] = [*notes.get(name, []), reason]
    if not notes:
        return job
    assignment: Assignment = replace(job.assignment, methods=methods, activations=inputs)
    forms = {
        name: planned_form(assignment, name, (form["shape"][0], form["shape"][1])) for name, form in job.forms.items()
    }
    return replace(job, assignment=assignment, forms=forms, notes=notes)


def _types(job: Job) -> tuple[dict[str, Method | None], dict[str, list[str]]]:
    """Methods with their types settled by each weight, and why."""
    methods, notes = dict(job.assignment.methods), {}
    for name, method in methods.items():
        if method is not None and method.undecided:
            methods[name], note = method.decided(job.source.tensor(f"{name}.weight"))
            notes[name] = [note]
    return methods, notes


def _widths(job: Job, tokens: Tensor, pool: Workers) -> tuple[dict[str, ActivationMethod], dict[str, str]]:
    """Quantizers of inputs with their widths settled by what each type of linears costs, and why."""
    inputs, notes = dict(job.assignment.activations), {}
    open_ones = {name: found for name, found in inputs.items() if isinstance(found, FlexQInputs)}
    for method in dict.fromkeys(open_ones.values()):
        names = [name for name, found in open_ones.items() if found == method]
        types = list(dict.fromkeys(map(layer_type, names)))
        probes = [{name: method.spec() for name in names if layer_type(name) == type} for type in types]
        base, *probed = losses(
            job.source, job.structure, job.assignment.methods, tokens[: method.samples, :TOKENS], probes, pool
        )
        costs = {type: loss - base for type, loss in zip(types, probed, strict=True)}
        wide = method.sensitive(costs)
        for name in names:
            spec = method.spec(layer_type(name) in wide)
            inputs[name] = IntInputs(bits=spec.bits, granularity="group", group_size=spec.group_size)
            cost = costs[layer_type(name)]
            notes[name] = (
                f"{method.bits}-bit inputs of every {layer_type(name)} cost {cost:+.4f} nats: {spec.bits} bits"
            )
    return inputs, notes
