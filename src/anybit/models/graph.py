"""Which linears of a block read the same tensor, in which order, and which norm wrote that tensor.

Found by running the block once and watching where tensors lie in memory: two linears share an input when their input
has the same address and element count (a reshape keeps both). Every tensor seen is kept alive until the end, so an
address cannot be used twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import StructureError
from anybit.models.structure import is_matrix, is_norm

_NOISE = 1e-5  # of the largest value: float32 rounding stays below it
Key = tuple[int, int]
Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor, in execution order; `norm` wrote it (None: something else did).

    `expert`: index inside `experts`, the name of the list of experts; both None outside a mixture of experts.
    """

    linears: tuple[str, ...]
    norm: str | None
    expert: int | None = None
    experts: str | None = None


@dataclass(frozen=True)
class BlockGraph:
    """Names are relative to the block. `readers`: (norm, module) for modules that are no linear but multiply the norm's
    output by a weight of their own (routers); they are never quantized but must follow when the norm is rescaled."""

    groups: tuple[InputGroup, ...]
    readers: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear once, in group order."""
        return tuple(name for group in self.groups for name in group.linears)


@dataclass
class _Trace:
    """Addresses seen in one run: of each module's input, in call order, and of each norm's output."""

    inputs: dict[str, Key] = field(default_factory=dict)
    written_by: dict[Key, str] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def key(self, tensor: Tensor) -> Key:
        self.alive.append(tensor)
        return tensor.data_ptr(), tensor.numel()


def trace_block(block: nn.Module, hidden: Tensor, kwargs: Kwargs) -> BlockGraph:
    """Runs `block(hidden [1, T, H], **kwargs)` once. Experts no token went to are listed like those that were hit.

    Raises StructureError when a linear of the block did not run (and is no expert).
    """
    trace = _Trace()
    with _watching(block, trace), torch.no_grad():
        block(hidden, **kwargs)
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    homes = {name: home for name in linears if (home := _expert_of(block, name)) is not None}
    idle = sorted(linears - trace.inputs.keys() - homes.keys())
    if idle:
        raise StructureError(f"{type(block).__name__}: {', '.join(idle)} did not run in the trace; cannot place it")
    groups = _groups(trace, linears, homes)
    readers = tuple(
        (trace.written_by[key], name)
        for name, key in trace.inputs.items()
        if key in trace.written_by and name not in linears and is_matrix(block.get_submodule(name))
    )
    return BlockGraph(tuple(_with_all_experts(block, groups)), readers)


def read_by_other_tokens(block: nn.Module, hidden: Tensor, kwargs: Kwargs, linears: Sequence[str]) -> bool:
    """Whether what `linears` write at the first token of hidden [1, T, H] reaches the block's output at later tokens.

    True for keys and values, which every later token attends to; false for what acts on each token alone.
    """

    def disturb(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1] + out.abs().amax(), out[:, 1:]], 1)

    before = run_block(block, hidden, kwargs)
    handles = [block.get_submodule(name).register_forward_hook(disturb) for name in linears]
    try:
        after = run_block(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return bool(((after - before)[:, 1:].abs() > _NOISE * before[:, 1:].abs().amax()).any())


def run_block(block: nn.Module, hidden: Tensor, kwargs: Kwargs) -> Tensor:
    """The hidden states [1, T, H] that the block returns, without gradients."""
    with torch.no_grad():
        out = block(hidden, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def block_inputs(model: nn.Module, blocks: Sequence[str], ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """(hidden, keyword arguments) of each block when `model` (real) runs on token ids [1, T] without a cache."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(bind_call(block, args, kwargs))

    handles = [model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True) for name in blocks]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def bind_call(block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Tensor, dict[str, Any]]:
    """A call of `block` as (hidden, everything else by keyword): models disagree on what they pass by position."""
    bound = inspect.signature(block.forward).bind_partial(*args, **kwargs)
    names = list(bound.signature.parameters)
    rest = {name: value for name, value in bound.arguments.items() if name != names[0]}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest.update(rest.pop(name, {}))
    return bound.arguments[names[0]], rest


@contextmanager
def _watching(block: nn.Module, trace: _Trace) -> Iterator[None]:
    handles = []
    for name, module in block.named_modules():
        if not name:
            continue

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if first is not None:
                trace.inputs.setdefault(name, trace.key(first))

        def after(_: nn.Module, __: tuple[Any, ...], out: Any, name: str = name) -> None:
            if isinstance(out, Tensor):
                trace.written_by[trace.key(out)] = name

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if is_norm(module):
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert_of(block: nn.Module, name: str) -> tuple[str, int] | None:
    """(list, index) when the linear lies in a ModuleList inside the block."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if isinstance(block.get_submodule(parent), nn.ModuleList):
            return parent, int(parts[depth])
    return None


def _groups(trace: _Trace, linears: set[str], homes: dict[str, tuple[str, int]]) -> list[InputGroup]:
    """Groups of the linears that ran, in the order of their first call."""
    found: dict[tuple[Key, tuple[str, int] | None], InputGroup] = {}
    entered: set[tuple[str, int]] = set()
    for name, key in trace.inputs.items():
        if name not in linears:
            continue
        home = homes.get(name)
        at = (key, home)
        if at in found:
            found[at] = replace(found[at], linears=(*found[at].linears, name))
            continue
        norm = trace.written_by.get(key)
        if home is not None and home not in entered:  # tokens are gathered on the way in: look at who gathered them
            norm = norm or _norm_above(trace, home[0])
            entered.add(home)
        experts, expert = home if home is not None else (None, None)
        found[at] = InputGroup((name,), norm, expert, experts)
    return list(found.values())


def _norm_above(trace: _Trace, name: str) -> str | None:
    """The norm that wrote the input of the nearest module around `name` (itself included) that has one."""
    while name:
        key = trace.inputs.get(name)
        if key in trace.written_by:
            return trace.written_by[key]
        name = name.rpartition(".")[0]
    return None


def _with_all_experts(block: nn.Module, groups: list[InputGroup]) -> Iterator[InputGroup]:
    """The groups, those of each list of experts together and by index, with experts nobody visited filled in."""
    done: set[str] = set()
    for group in groups:
        if group.experts is None:
            yield group
        elif group.experts not in done:
            done.add(group.experts)
            model_of = [g for g in groups if (g.experts, g.expert) == (group.experts, group.expert)]
            for index in range(len(list(block.get_submodule(group.experts).children()))):
                own = [g for g in groups if (g.experts, g.expert) == (group.experts, index)]
                yield from own or [_moved(g, index) for g in model_of]


def _moved(group: InputGroup, index: int) -> InputGroup:
    """The same group in expert `index` of the same list."""
    old, new = f"{group.experts}.{group.expert}.", f"{group.experts}.{index}."
    return replace(group, linears=tuple(new + name.removeprefix(old) for name in group.linears), expert=index)
