"""Which precisions, and where to switch: phase-aware allocation and static switch points (methods/pmpd.md 2.1, 2.3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anybit.engine.schedule import FixedSchedule
from anybit.engine.schedulers.static import candidates, mean_bits, static
from anybit.errors import InputError, PromiseError


@dataclass(frozen=True)
class Target:
    """What a schedule has to meet.

    Attributes:
        loss: most of the quality at the highest precision that may be lost, as a share; or None.
        bits: most mean bits (honest); or None. One of the two is set.
    """

    loss: float | None = None
    bits: float | None = None


@dataclass(frozen=True)
class Option:
    """One measured schedule.

    Attributes:
        prefill: precision prompts are read at.
        bits: mean over decode steps, honest.
        quality: larger is better, one number per prompt.
    """

    schedule: FixedSchedule
    prefill: int
    bits: float
    quality: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean quality."""
        return sum(self.quality) / len(self.quality)


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: what to use.
        top: the highest precision throughout: what losses are measured from.
        options: everything measured, best and top among them, most bits first.
    """

    best: Option
    top: Option
    options: tuple[Option, ...]


Measure = Callable[[FixedSchedule, int], Option]
"""Runs a schedule with prompts read at a precision."""


def parse_target(target: str | None, mean_bits: float | None) -> Target:
    """`rouge-loss<=0.02` (2 % of ROUGE-L at the highest precision), or a budget of mean bits; default: that 2 %.

    Raises:
        InputError: both, or something else.
    """
    if target is not None and mean_bits is not None:
        raise InputError("give --target or --mean-bits, not both")
    if mean_bits is not None:
        if mean_bits < 1:
            raise InputError(f"--mean-bits {mean_bits}: at least 1")
        return Target(bits=mean_bits)
    found = re.fullmatch(r"\s*rouge-loss\s*<=\s*(\d*\.?\d+)\s*(%?)\s*", target or "rouge-loss<=0.02")
    if not found:
        raise InputError(f"--target {target}: write 'rouge-loss<=0.02' (a share of ROUGE-L) or 'rouge-loss<=2%'")
    loss = float(found[1]) / (100 if found[2] else 1)
    if loss >= 1:
        raise InputError(f"--target {target}: a loss is a share below 1; write 'rouge-loss<=2%' for two percent")
    return Target(loss=loss)


def search(chain: Sequence[int], length: int, target: Target, measure: Measure) -> Found:
    """The cheapest schedule that keeps the quality, or the best one within a budget of bits.

    First one precision for each phase: for prompts the lowest that, used throughout, meets the target; then decoding lower
    step by step, with switch points on the grid. Where prompts could do with less than the highest precision, that one is
    tried too: a better read prompt may let decoding do with fewer bits, and decoding is what costs. A budget of bits reads
    prompts at the highest precision.

    Args:
        chain: precisions, falling.
        length: most new tokens.

    Raises:
        PromiseError: a budget of bits below the lowest precision.
    """
    top = measure(static(chain[:1], []), chain[0])
    if target.bits is not None:
        options = [top] + [measure(schedule, chain[0]) for schedule in candidates(chain, length)[1:]]
        within = [option for option in options if option.bits <= target.bits + 1e-9]
        if not within:
            raise PromiseError(f"no schedule of {list(chain)} needs at most {target.bits} bits; add a lower precision")
        return _found(max(within, key=lambda option: (option.mean, -option.bits)), top, options)
    assert target.loss is not None
    floor = top.mean * (1 - target.loss)
    prefill, tried = _prefill(chain, floor, top, measure)
    usable = [bits for bits in chain if bits <= prefill]
    tried += [
        measure(schedule, prefill) for schedule in candidates(usable, length) if schedule.switches != ((0, prefill),)
    ]
    if prefill < chain[0]:
        best = min(option.bits for option in tried if option.mean >= floor)
        tried += [
            measure(schedule, chain[0]) for schedule in candidates(chain, length) if mean_bits(schedule, length) < best
        ]
    fine = [option for option in tried if option.mean >= floor]
    return _found(min(fine, key=lambda option: (option.bits, option.prefill, -option.mean)), top, tried)


def _prefill(chain: Sequence[int], floor: float, top: Option, measure: Measure) -> tuple[int, list[Option]]:
    """The lowest precision that is good enough throughout, and what was tried on the way down."""
    tried = [top]
    for bits in chain[1:]:
        tried.append(measure(static([bits], []), bits))
        if tried[-1].mean < floor:
            return tried[-2].prefill, tried
    return chain[-1], tried


def _found(best: Option, top: Option, options: Sequence[Option]) -> Found:
    return Found(best, top, tuple(sorted(options, key=lambda option: (-option.bits, -option.prefill))))
