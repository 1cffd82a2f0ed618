"""Trains the tables of a block's quantized linears on the block's output, one precision after the other.

Deterministic for any number of threads: every sample's gradient is one task, gradients are added in sample order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.blocks import Quantized
from anybit.calibration.activations import Activations
from anybit.calibration.parallel import Workers
from anybit.calibration.statistics import BlockCall
from anybit.checkpoint.ledger import check_numbers, tensor_sha256
from anybit.errors import RecipeError
from anybit.formats.planes import unpack
from anybit.formats.terms import CodeTerm, Term, dense, load_terms, precisions, save_terms
from anybit.methods.tune_tables import Tunable, TuneTables, tunable


@dataclass
class Linear:
    """A quantized linear of the block: its entry, its parameter in the block, its present terms."""

    done: Quantized
    parameter: Tensor
    terms: list[Term]

    def at(self, bits: int) -> Tensor:
        """float32 [N, K] at `bits`, or whole when it is not nested."""
        return dense(self.terms, bits if bits in precisions(self.done.form) else None)


def tune_block(
    prefix: str,
    call: BlockCall,
    source: Activations,
    targets: Activations,
    method: TuneTables,
    done: Sequence[Quantized],
    pool: Workers,
) -> list[Quantized]:
    """`done` with tuned tables; `targets` are the float block's outputs on `source`. The block holds the new weights after.

    Raises:
        RecipeError: no linear of the block has tables that could be tuned at the asked precisions.
    """
    linears = []
    for item in done:
        parameter = call.block.get_parameter(f"{item.name.removeprefix(prefix + '.')}.weight")
        linears.append(Linear(item, parameter, load_terms(item.form, item.tensors)))
    stream = [linear.parameter.clone() for linear in linears]
    widths = sorted({p for linear in linears for p in precisions(linear.done.form) if p <= method.highest})
    widths = [p for p in widths if any(tunable(term, p) for linear in linears for term in linear.terms)]
    if not widths:
        raise RecipeError(
            f"{prefix}: stage compensate has '{method.name}', but no linear has float tables at {method.highest} bits or "
            "less; use it with any-precision or anybcq, or raise `highest`"
        )
    training = _Training(call, source, targets, method, pool)
    notes = [training.tune(linears, bits) for bits in widths]
    for linear, old in zip(linears, stream, strict=True):
        # The block goes on at the precision it had: its largest, unless the pipeline chose another.
        before = load_terms(linear.done.form, linear.done.tensors)
        held = next((p for p in precisions(linear.done.form) if torch.equal(dense(before, p), old)), None)
        linear.parameter.copy_(dense(linear.terms, held))
    return [_saved(linear, notes) for linear in linears]


class _Training:
    """The block, what it should give, and how hard to try."""

    def __init__(
        self, call: BlockCall, source: Activations, targets: Activations, method: TuneTables, pool: Workers
    ) -> None:
        self.call, self.source, self.targets, self.method, self.pool = call, source, targets, method, pool

    def tune(self, linears: Sequence[Linear], bits: int) -> str:
        """Tune the tables of precision `bits` in place of the present ones where that helps; a note on what it did."""
        for linear in linears:
            linear.parameter.copy_(linear.at(bits))
        before = self.error()
        pieces = [[_movable(term, bits) for term in linear.terms] for linear in linears]
        self._train(linears, pieces, bits)
        tuned = [[p.rounded() if isinstance(p, Tunable) else p for p in piece] for piece in pieces]
        for linear, terms in zip(linears, tuned, strict=True):
            linear.parameter.copy_(replace(linear, terms=terms).at(bits))
        after = self.error()
        if not after < before:
            return f"{bits} bits: tables left as they were, training did not lower the block's error"
        for linear, terms in zip(linears, tuned, strict=True):
            linear.terms = terms
        return f"{bits} bits: tables tuned, block error {before:.4g} -> {after:.4g}; `error` was taken before"

    def error(self) -> float:
        """Mean squared error of the block's output over all samples, relative to the mean square of the target."""

        def task(sample: int) -> tuple[float, float]:
            target = self.targets.read(sample)
            lost = (self.call.run(self.source.read(sample)) - target).double().square().sum()
            return float(lost), float(target.double().square().sum())

        parts = self.pool.map(task, range(self.source.samples))
        return sum(lost for lost, _ in parts) / max(sum(size for _, size in parts), 1e-30)

    def _train(self, linears: Sequence[Linear], pieces: Sequence[Sequence[Tunable | Term]], bits: int) -> None:
        shifts = [shift for piece in pieces for p in piece if isinstance(p, Tunable) for shift in p.shifts.values()]
        optimizer = torch.optim.Adam(shifts, lr=self.method.lr)
        starts = list(range(0, self.source.samples, self.method.batch)) * self.method.epochs
        for step, start in enumerate(starts):
            for group in optimizer.param_groups:
                group["lr"] = self.method.lr * (1 - step / len(starts))
            with torch.enable_grad():
                weights = [_total(piece, bits) for piece in pieces]
            gradients = self._gradients(
                linears, weights, range(start, min(start + self.method.batch, self.source.samples))
            )
            moving = [pair for pair in zip(weights, gradients, strict=True) if pair[0].requires_grad]
            optimizer.zero_grad()
            torch.autograd.backward([weight for weight, _ in moving], [gradient for _, gradient in moving])
            optimizer.step()

    def _gradients(self, linears: Sequence[Linear], weights: Sequence[Tensor], samples: range) -> list[Tensor]:
        """d error / d weight of each linear, summed over `samples`, with `weights` in the block."""
        parameters = [linear.parameter for linear in linears]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight.detach())

        def task(sample: int) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                out = self.call.block(self.source.read(sample), **self.call.arguments)
                out = out if isinstance(out, Tensor) else out[0]
                loss = (out - self.targets.read(sample)).square().mean()
                return torch.autograd.grad(loss, parameters, allow_unused=True)

        total = [torch.zeros_like(parameter) for parameter in parameters]
        with _differentiable(parameters):
            for found in self.pool.map(task, samples):
                for whole, gradient in zip(total, found, strict=True):
                    if gradient is not None:  # an expert that no token of this sample reached
                        whole += gradient
        return total


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _movable(term: Term, bits: int) -> Tunable | Term:
    if not isinstance(term, CodeTerm) or not tunable(term, bits):
        return term
    start, stop = term.columns
    return Tunable(term, unpack(term.planes, stop - start), bits)


def _total(pieces: Sequence[Tunable | Term], bits: int) -> Tensor:
    parts = [p.dense() if isinstance(p, Tunable) else dense([p], bits if _nested(p) else None) for p in pieces]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _nested(term: Term) -> bool:
    return isinstance(term, CodeTerm) and len(term.decoder.precisions) > 1


def _saved(linear: Linear, notes: Sequence[str]) -> Quantized:
    done = linear.done
    form, tensors = save_terms(linear.terms, done.row.shape)
    check_numbers(done.name, tensors)
    hashes = {key: tensor_sha256(tensor) for key, tensor in tensors.items()}
    return Quantized(
        done.name, form, tensors, done.row.model_copy(update={"sha256": hashes, "notes": [*done.row.notes, *notes]})
    )
