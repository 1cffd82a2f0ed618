"""What `--prefill-precision`, `--schedule`, `--guard` and `--draft` say, checked before a model is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.ledger import chosen_precision, in_blocks, mean_code_bits, nested_precisions, stored_precisions
from anybit.engine.drafting.drafter import check_name
from anybit.engine.schedule import Scheduler, check_available, parse_schedule
from anybit.errors import InputError

Prefill = Annotated[str | None, typer.Option(metavar="P", help="Bits while reading the prompt; default: all stored")]
Schedule = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Bits per decode step: 4, 4@0,3@32, auto or task:NAME; default: all stored"),
]
Draft = Annotated[
    str,
    typer.Option(
        metavar="ngram|lookup|self|none", help="Guess tokens ahead and check several at once; the text stays the same"
    ),
]
Guard = Annotated[bool, typer.Option("--guard", help="Go back up to more bits where fewer cannot be trusted")]


class Decoding:
    """The options of a command as `engine.generate` takes them.

    Attributes:
        options: `prefill_precision`, `schedule`, `guard` and `draft`.
        stored: code bits per weight of a checkpoint with one precision; None for a nested one.
    """

    def __init__(self, directory: Path, ledger: dict[str, Any], *, guard: bool = False, draft: str = "none") -> None:
        """Both precisions are all that is stored.

        Raises:
            InputError: unknown drafter, or a guard or drafter that needs several precisions where there is one.
        """
        self._directory, self._ledger, self._prefill = directory, ledger, False
        nested = nested_precisions(ledger)
        self.stored = None if nested else mean_code_bits(ledger)
        check_name(draft, nested)
        if guard and not nested:
            raise InputError("--guard: this checkpoint is not nested, there is nothing to raise; leave it out")
        self.options: dict[str, Any] = {"prefill_precision": None, "schedule": None, "guard": guard, "draft": draft}

    def read_prompts_at(self, text: str | None) -> None:
        """`--prefill-precision`. InputError: not in this checkpoint."""
        self.options["prefill_precision"] = chosen_precision(self._ledger, "--prefill-precision", text)
        self._prefill = text is not None

    def follow(self, spec: str | None) -> None:
        """`--schedule`.

        Raises:
            InputError: not a schedule, or one that this checkpoint cannot follow.
        """
        if spec is None or spec == "stored":
            self.options["schedule"] = None
        elif self.stored is None:
            self._follow_nested(spec)
        elif spec not in stored_precisions(self._ledger):
            if spec[:1].isdigit():
                check_available(parse_schedule(spec), [max(row["bits"] for row in in_blocks(self._ledger))])
            raise InputError(
                f"--schedule {spec}: this checkpoint is not nested, it runs at {self.stored:g} bits only; "
                "quantize with a nested recipe (pmpd, any-precision, anybcq)"
            )

    def _follow_nested(self, spec: str) -> None:
        available = nested_precisions(self._ledger)
        if spec[:1].isdigit():
            scheduler: Scheduler = parse_schedule(spec, may_rise=self.options["guard"])
            check_available(scheduler, available)
        else:
            from anybit.engine.schedulers.resolve import prefill_bits, resolve

            scheduler = resolve(spec, self._directory, available)
            if not self._prefill:  # what the schedule was tuned with
                self.options["prefill_precision"] = prefill_bits(scheduler)
        self.options["schedule"] = scheduler
