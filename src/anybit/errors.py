"""Every error anybit raises on purpose.

AnybitError                     a known failure; the command line prints one line and exits with `exit_code`
├── InputError            (2)   wrong usage or input: the message says what, where and how to fix
│   ├── FormatError       (2)   bytes or metadata that are not what the format says
│   ├── StructureError    (2)   a model whose structure was not recognised
│   ├── CalibrationError  (2)   text or statistics that cannot calibrate
│   └── RecipeError       (2)   a recipe, stage, option or pattern that does not fit
├── Busy                  (1)   no room for another request now; the same may be asked again
├── PromiseError          (3)   a budget, ledger or quality gate was not met
└── KernelUnavailable     (2)   a forced kernel choice that cannot run here, with the reason
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnybitError(Exception):
    """Base of all deliberate failures; `str(error)` is one complete line for a person."""

    exit_code = 1


class InputError(AnybitError):
    """Wrong usage or input."""

    exit_code = 2


class FormatError(InputError):
    """Bytes or metadata that are not what the format says."""


class StructureError(InputError):
    """A model whose structure was not recognised."""


class CalibrationError(InputError):
    """Text or statistics that cannot calibrate."""


class RecipeError(InputError):
    """A recipe, stage, option or pattern that does not fit."""


class Busy(AnybitError):
    """No room for another request now; the same may be asked again later."""


class Draining(Busy):
    """Nothing new is accepted any more; another server may."""


class PromiseError(AnybitError):
    """A budget, ledger or quality gate was not met."""

    exit_code = 3


class KernelUnavailable(AnybitError):
    """A forced kernel choice that cannot run here."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
