"""Quantize one block: statistics of each group of linears on already quantized predecessors, terms, ledger rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall, collect
from anybit.checkpoint.ledger import Row, form_word, reworded, row
from anybit.errors import CalibrationError
from anybit.formats.activation import restore_activations
from anybit.formats.decoder import Form
from anybit.formats.terms import Term, dense, load_terms, precisions, row_slice, save_terms
from anybit.layers.integer import bypassed, dequantized
from anybit.layers.linear import kernel_name
from anybit.methods.base import InputStats, Method, relative_output_error
from anybit.methods.nested import Nested
from anybit.methods.rtn import RTN
from anybit.models.graph import BlockGraph, InputGroup, read_by_other_tokens
from anybit.recipe import Assignment

CHUNK_WEIGHTS = 1 << 22  # weights of a table quantized at a time when its method needs no statistics


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor ready to be saved: its module name, form, named tensors and ledger row."""

    name: str
    form: Form
    tensors: dict[str, Tensor]
    row: Row


def quantize_block(
    prefix: str,
    call: BlockCall,
    graph: BlockGraph,
    source: Activations,
    assignment: Assignment,
    pool: Workers,
    allow_unseen: bool,
    fisher: Mapping[str, Tensor] | None = None,
) -> list[Quantized]:
    """Every linear of the block at `prefix`, in execution order; afterwards the block holds the dequantized weights, and a
    linear with quantized activations reads its input as the quantized layer will (until `call.detach()`).

    Groups are taken one after the other ("true sequential"): each sees inputs made by quantized predecessors, and is fitted
    to its own input as it is before quantization. `fisher` has the squared gradients float32 [N, K] of linears, by full
    name, for methods that read them.

    Raises:
        CalibrationError: an expert no calibration token reached, unless `allow_unseen`.
    """
    done: list[Quantized] = []
    methods, inputs = assignment.methods, assignment.activations
    for stage in stages(graph):
        names = [f"{prefix}.{name}" for group in stage for name in group.linears]
        wanting = [found for name in names for found in (methods.get(name), inputs.get(name)) if found is not None]
        needs = frozenset().union(*(found.needs for found in wanting))
        first = [group.linears[0] for group in stage]
        weights = first_token_weights(prefix, call, source, stage, methods)
        statistics = (
            collect(call, source, first, needs, pool, weights) if needs else {name: InputStats() for name in first}
        )

        rows_pool = pool if len(stage) == 1 else None  # experts share the cores already

        def quantize_group(
            group: InputGroup, statistics: Mapping[str, InputStats] = statistics, rows_pool: Workers | None = rows_pool
        ) -> list[Quantized]:
            stats = replace(statistics[group.linears[0]], after_norm=group.norm is not None)
            found = _quantize_group(prefix, call.block, group, stats, methods, allow_unseen, rows_pool, fisher or {})
            return [with_inputs(item, assignment, stats) for item in found]

        groups = map(quantize_group, stage) if rows_pool else pool.map(quantize_group, stage)
        finished = [found for group in groups for found in group]
        for item in finished:
            if "activations" in item.form:
                call.attach(item.name.removeprefix(f"{prefix}."), _reader(item))
        done += finished
    return done


def noted(done: Sequence[Quantized], prefix: str, changes: Sequence[str], learned: Sequence[str]) -> list[Quantized]:
    """`done` with what transforms say, "linear: what", in the ledger row of that linear, and what learners say in every row."""
    found = []
    for item in done:
        own = f"{item.name.removeprefix(f'{prefix}.')}: "
        news = [change.removeprefix(own) for change in changes if change.startswith(own)]
        found.append(replace(item, row=item.row.model_copy(update={"notes": [*item.row.notes, *news, *learned]})))
    return found


def with_inputs(item: Quantized, assignment: Assignment, stats: InputStats) -> Quantized:
    """`item` with the operations on its input, then the scheme of its input, the scheme's tensors and what the ledger says of
    both."""
    ops, method = assignment.ops(item.name, item.form["shape"][1]), assignment.activations.get(item.name)
    if not ops and method is None:
        return item
    form, tensors = item.form | ({"inputs": ops} if ops else {}), item.tensors
    if method is not None:
        form = form | {"activations": method.spec().form()}
        tensors = tensors | method.tensors(replace(stats, name=item.name), form["shape"][1])
    return Quantized(item.name, form, tensors, reworded(item.row, form, tensors, kernel_name(form, 1)))


def _reader(item: Quantized) -> Callable[[Tensor], Tensor]:
    """What a quantized layer reads of its input: float32 [..., K] -> [..., K]."""
    spec, bypass = restore_activations(item.form), bypassed(load_terms(item.form, item.tensors))
    assert spec is not None

    def read(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return dequantized(rows, lambda rows: spec.encode(rows, item.tensors, bypass), bypass).view(x.shape)

    return read


def first_token_weights(
    prefix: str, call: BlockCall, source: Activations, stage: Sequence[InputGroup], methods: Mapping[str, Method | None]
) -> dict[str, float]:
    """As how many tokens the first of each sample counts in the Hessian of a group, where its method asks for more
    than 1."""
    weights = {}
    for group in stage:
        weight = max(getattr(methods.get(f"{prefix}.{name}"), "first_token_weight", 1.0) for name in group.linears)
        if (
            weight > 1
            and group.experts is None
            and read_by_other_tokens(call.block, source.read(0), call.arguments, group.linears)
        ):
            weights[group.linears[0]] = weight
    return weights


def stages(graph: BlockGraph) -> Iterator[list[InputGroup]]:
    """Groups in execution order, one a stage; the experts of one list go together, all first groups before all
    second."""
    experts: dict[tuple[str, int], list[InputGroup]] = {}
    depth: dict[tuple[str, int | None], int] = {}
    order: list[tuple[str, int] | InputGroup] = []
    for group in graph.groups:
        if group.experts is None:
            order.append(group)
            continue
        at = depth.get((group.experts, group.expert), 0)
        depth[group.experts, group.expert] = at + 1
        if (group.experts, at) not in experts:
            order.append((group.experts, at))
        experts.setdefault((group.experts, at), []).append(group)
    for item in order:
        yield [item] if isinstance(item, InputGroup) else experts[item]


def quantize_table(name: str, weight: Tensor, method: Method) -> Quantized:
    """A big table [V, H] by a method that needs no calibration, a few rows at a time.

    Raises:
        CalibrationError: the method does need calibration; embeddings and heads have none here.
    """
    if method.needs:
        raise CalibrationError(
            f"{name}: method '{method.name}' needs calibration inputs, which embeddings and heads do not have; use rtn"
        )
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [method.quantize(rows.float(), InputStats(name=name)) for rows in weight.split(step)]
    lost = sum(
        float((rows.float() - dense(terms)).square().sum())
        for rows, terms in zip(weight.split(step), parts, strict=True)
    )
    size = sum(float(rows.float().square().sum()) for rows in weight.split(step))
    saved = [
        save_terms(terms, (len(rows), weight.shape[1]))[1]
        for rows, terms in zip(weight.split(step), parts, strict=True)
    ]
    tensors = _stack(saved)
    form = method.plan((weight.shape[0], weight.shape[1]))
    error = (lost / max(size, 1e-30)) ** 0.5
    facts = row(
        name, form_word(form), form, tensors, calibration_tokens=0, error=error, kernel=kernel_name(form, 1), notes=[]
    )
    return Quantized(name, form, tensors, facts)


def _quantize_group(
    prefix: str,
    block: nn.Module,
    group: InputGroup,
    stats: InputStats,
    methods: Mapping[str, Method | None],
    allow_unseen: bool,
    pool: Workers | None,
    fisher: Mapping[str, Tensor],
) -> list[Quantized]:
    done = []
    for method, names in _by_method([(methods.get(f"{prefix}.{name}"), name) for name in group.linears]):
        if method is None:
            continue
        notes: list[str] = []
        if method.needs and stats.tokens == 0:
            method = _without_tokens(f"{prefix}.{names[0]}", method, allow_unseen)
            notes.append("no calibration token reached this expert: rounded to nearest")
        weights: list[Tensor] = [block.get_parameter(f"{name}.weight") for name in names]
        gradients = torch.cat([fisher[f"{prefix}.{name}"] for name in names]) if method.gradients else None
        named = replace(stats, name=f"{prefix}.{names[0]}", fisher=gradients)
        together = _quantize_rows(method, torch.cat(weights) if len(weights) > 1 else weights[0], named, pool)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            terms = [row_slice(term, start, start + len(weight)) for term in together] if len(names) > 1 else together
            start += len(weight)
            values = dense(terms)
            error = relative_output_error(weight, values, stats)
            form, tensors = save_terms(terms, (len(weight), weight.shape[1]))
            widths = precisions(form) if len(precisions(form)) > 1 else ()
            errors = {bits: relative_output_error(weight, dense(terms, bits), stats) for bits in widths}
            facts = {"calibration_tokens": stats.tokens, "error": error, "errors": errors}
            planned = form_word(method.settle((len(weight), weight.shape[1]), named))
            done.append(_account(f"{prefix}.{name}", form, tensors, planned, facts, notes))
            stream = getattr(method, "stream", None)
            weight.copy_(values if stream is None else dense(terms, stream))
    return done


def _quantize_rows(method: Method, weight: Tensor, stats: InputStats, pool: Workers | None) -> list[Term]:
    """`method.quantize`, cut the same way whatever the number of cores, so that the bytes do not depend on it."""
    if method.rows_at_once is None:
        return method.quantize(weight, stats)
    assert stats.fisher is None, "a method that reads gradients would need their rows cut too"
    pieces = weight.split(method.rows_at_once)
    work = map if pool is None else pool.map
    parts = list(work(lambda rows: method.quantize(rows, stats), pieces))
    shape = (weight.shape[0], weight.shape[1])
    return load_terms(save_terms(parts[0], shape)[0], _stack([save_terms(part, shape)[1] for part in parts]))


def _stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors of a weight from those of its pieces by rows; planes have rows on their second axis."""
    return {key: torch.cat([part[key] for part in parts], 1 if key == "weight" else 0) for key in parts[0]}


def _account(
    name: str,
    form: Form,
    tensors: dict[str, Tensor],
    planned: str,
    facts: dict[str, Any],
    notes: list[str],
) -> Quantized:
    shape: tuple[int, int] = (form["shape"][0], form["shape"][1])
    if shape[1] % (size := form["terms"][0].get("group_size", shape[1])):
        notes = [*notes, f"{size} does not divide {shape[1]} columns: the last group of each row has {shape[1] % size}"]
    return Quantized(
        name, form, tensors, row(name, planned, form, tensors, kernel=kernel_name(form, 1), notes=notes, **facts)
    )


def _without_tokens(name: str, method: Method, allowed: bool) -> Method:
    """Round-to-nearest with the same grid, for an expert that saw nothing; nested weights do without in their own way."""
    if not allowed:
        raise CalibrationError(
            f"{name}: no calibration token reached this expert; use more text (--samples), or pass "
            "--allow-unseen-experts to round its weights to nearest"
        )
    if isinstance(method, Nested):
        return method
    return RTN(**{key: value for key, value in method.model_dump().items() if key in RTN.model_fields})


def _by_method(items: Sequence[tuple[Method | None, str]]) -> list[tuple[Method | None, list[str]]]:
    """Names with equal methods together (if the method works row by row), in first-seen order."""
    found: list[tuple[Method | None, list[str]]] = []
    for method, name in items:
        same = next(
            (names for other, names in found if method is not None and method.rowwise and other == method), None
        )
        if same is None:
            found.append((method, [name]))
        else:
            same.append(name)
    return found
