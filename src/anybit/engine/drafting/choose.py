"""The drafter that a name stands for."""

from __future__ import annotations

from anybit.engine.drafting.drafter import Drafter, check_name
from anybit.engine.drafting.lookup import LookupDrafter
from anybit.engine.drafting.ngram import NgramDrafter
from anybit.engine.drafting.pace import Pace
from anybit.engine.drafting.self_speculation import SelfDrafter, draft_bits
from anybit.engine.sampler import Sampler
from anybit.engine.schedule import Scheduler
from anybit.engine.stepper import Stepper
from anybit.engine.steps import Drafting
from anybit.errors import InputError

_LONGEST = 15  # tokens of a guess: 16 rows are what a matrix unit takes at once; the pace says how many pay


def drafting(draft: str | Drafter, runner: Stepper, sampler: Sampler, scheduler: Scheduler) -> Drafting | None:
    """Who guesses for this request; None: nobody.

    Args:
        draft: one of `drafter.NAMES`, `self:BITS`, or a drafter, whose guesses are used whole.

    Raises:
        InputError: unknown name; a model whose text drafting would change; `self` without a precision to guess at.
    """
    if draft == "none":
        return None
    name, _, bits = draft.partition(":") if isinstance(draft, str) else ("", "", "")
    if isinstance(draft, str):
        check_name(draft, runner.precision.available)
    if runner.inexact:
        raise InputError(f"--draft {name or 'with a drafter'}: {runner.inexact}, so drafting could change the text; "
                         "use --engine native, or --draft none")  # fmt: skip
    if not isinstance(draft, str):
        return Drafting(draft)
    if name == "self":
        return Drafting(_self(bits, runner, sampler, scheduler), Pace((0.7,), runner.times, allowance=3.0, tries=True))
    drafter = NgramDrafter(longest=_LONGEST) if name == "ngram" else LookupDrafter(longest=_LONGEST)
    return Drafting(drafter, Pace(times=runner.times))


def _self(bits: str, runner: Stepper, sampler: Sampler, scheduler: Scheduler) -> SelfDrafter:
    available, high = runner.precision.available, max(scheduler.precisions)
    if bits and int(bits) >= high:
        raise InputError(f"--draft self:{bits}: give one of {[width for width in available if width < high]}")
    chosen = int(bits) if bits else draft_bits(available, high)
    if chosen is None:
        raise InputError(f"--draft self: nothing is stored below the {high} bits of the schedule; raise the schedule")

    def choose(tokens: list[int], position: int) -> list[int]:
        if sampler.greedy:
            return runner.best(tokens)
        return [sampler(row, position + at) for at, row in enumerate(runner.verify(tokens))]

    return SelfDrafter(runner, choose, chosen)
