"""One layer of a checkpoint as one worker needs it: some of its rows (outputs) and columns (inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.errors import FormatError
from anybit.formats.activation import ActivationSpec, restore_activations
from anybit.formats.form import Form
from anybit.formats.slices import column_slice, same_tensors, stacked, static_slice
from anybit.formats.terms import LowRankTerm, Term, load_terms, row_slice, save_terms, tensor_specs
from anybit.layers.inputs import Op

Range = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """What is multiplied: a weight in terms, how its input is quantized (None: float) and changed before."""

    terms: list[Term]
    spec: ActivationSpec | None
    static: dict[str, Tensor]
    inputs: list[Op]

    @property
    def rows(self) -> int:
        """N."""
        term = self.terms[0]
        return int(term.u.shape[0]) if isinstance(term, LowRankTerm) else term.shape[0]


@dataclass
class Part:
    """A layer named as in the checkpoint, filled tensor by tensor as vLLM reads the files.

    Attributes:
        rows, columns: [start, stop) of what this worker keeps.
        tensors: by name, whole; given up for `shard` as soon as the last one is there.
    """

    name: str
    form: Form
    rows: Range
    columns: Range
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shard: Shard | None = None

    @property
    def names(self) -> set[str]:
        """Of the tensors that it needs."""
        return set(tensor_specs(self.form))

    def load(self, name: str, tensor: Tensor) -> None:
        """Take one whole tensor from the checkpoint; the last one cuts the layer.

        Raises:
            FormatError: a tensor that is not of the form's shape and dtype, or a layer that cannot be divided so.
        """
        self.tensors[name] = tensor
        if self.tensors.keys() == self.names:
            self.shard, self.tensors = self._cut(), {}

    def finished(self) -> Shard:
        """The shard. Raises FormatError when the checkpoint did not hold every tensor."""
        if self.shard is None:
            missing = sorted(self.names - self.tensors.keys())
            raise FormatError(f"the checkpoint lacks {self.name}.{missing[0]}; restore its files or quantize again")
        return self.shard

    def _cut(self) -> Shard:
        rows, columns = self.form["shape"]
        spec, inputs = restore_activations(self.form), list(self.form.get("inputs", ()))
        try:
            terms = load_terms(self.form, self.tensors)
            static = {name: self.tensors[name] for name in (spec.specs(columns) if spec else ())}
            if self.rows != (0, rows):
                terms = [row_slice(term, *self.rows) for term in terms]
            if self.columns != (0, columns):
                check_inputs(inputs, *self.columns)
                static = static_slice(spec, static, columns, *self.columns)
                found = [column_slice(term, *self.columns) for term in terms]
                terms = [term for term in found if term is not None]
            if (self.rows, self.columns) != ((0, rows), (0, columns)):
                terms = _owned(terms, (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]))
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None
        return Shard(terms, spec, static, inputs)


def own_share(name: str, whole: int, mine: int, rank: int, workers: int) -> Range:
    """[start, stop) of `whole` rows or columns for worker `rank` of `workers`, which holds `mine` of them.

    With fewer shares than workers (key and value heads) neighbours hold the same one.

    Raises:
        FormatError: `mine` says that the model is not of the checkpoint's shape.
    """
    shares = whole // mine if mine else 0
    if not shares or whole % mine or workers % shares:
        raise FormatError(
            f"{name}: {whole} rows or columns in the checkpoint, {mine} on each of {workers} workers in the model"
        )
    start = rank // (workers // shares) * mine
    return start, start + mine


def check_inputs(inputs: Sequence[Op], start: int, stop: int) -> None:
    """Raise FormatError when what a layer does to its input mixes columns start..stop-1 with others."""
    for op in inputs:
        block = op["sizes"][0] * op["sizes"][1] if op["op"] == "hadamard" else 0
        if not block or start % block or stop % block:
            raise FormatError(
                f"its input goes through '{op['op']}' over {block or 'all'} columns, which tensor parallelism would divide; "
                "serve it with tensor parallel size 1"
            )


def joined(shards: Sequence[Shard]) -> list[Shard]:
    """The parts of a fused layer (query, key, value) as one shard where all are written alike, else as they are."""
    first = shards[0]
    alike = all(shard.spec == first.spec and shard.inputs == first.inputs for shard in shards)
    if len(shards) == 1 or not alike or not same_tensors([shard.static for shard in shards]):
        return list(shards)
    terms = stacked([shard.terms for shard in shards])
    return list(shards) if terms is None else [Shard(terms, first.spec, first.static, first.inputs)]


def _owned(terms: Sequence[Term], shape: tuple[int, int]) -> list[Term]:
    """The terms over memory of their own, contiguous as kernels read it; the whole tensors they were cut from are let go."""
    form, tensors = save_terms(terms, shape)
    return load_terms(form, {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
