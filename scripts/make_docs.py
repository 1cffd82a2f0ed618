"""Write the reference pages that would go stale by hand: docs/cli.md from `--help`, docs/methods.md from the recipes.

Run: python scripts/make_docs.py            writes them
     python scripts/make_docs.py --check    changes nothing; exits 1, naming the page, when one is stale
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from anybit.cli import main as anybit
from anybit.cli.app import COMMANDS
from anybit.composition import reason
from anybit.recipe import ACTIVATIONS, COMPENSATIONS, LEARNERS, METHODS, TRANSFORMS, list_recipes

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by scripts/make_docs.py; do not edit. -->"
WIDTH = "100"

CLI_HEAD = """# Command line

Exit codes: 0 ok · 2 wrong usage or input · 3 a promise was not met (budget, ledger, quality gate) · 1 a bug (set
`ANYBIT_DEBUG=1` for the traceback) · 130 interrupted. With `--json`, stdout holds exactly one JSON value; everything for
people goes to stderr. Progress bars appear only when stderr is a terminal.
"""
METHODS_HEAD = """# Methods

Every published method is a recipe: a short YAML file in `src/anybit/recipes/`. `anybit recipes NAME` shows one in full,
`--set stage.option=value` changes an option, and your own YAML file works in place of a name.
"""

COMPOSITION_HEAD = """# What goes with what

A recipe is a list of stages, and every pair of them is allowed unless a rule in `src/anybit/composition.py` says why not; a
recipe that breaks one is refused before any work. `+`: the row's stage may come before the column's; `no (n)`: refused, for
reason n. Of the other stages a layer has one each, so those are not set against themselves.
"""

NESTED = """## Nested weights

`pmpd` stores 8-bit codes whose first 2, 3, 4, 5 or 6 bits are codes too: reading fewer bit-planes reads a coarser model, and
the grid of every width is uniform, so all of them run on the integer kernels. One code must serve every width at once:

1. *Joint error feedback.* Columns are quantized one after the other, as in GPTQ. Every width keeps its own corrected copy of
   the columns still to come; the code of a column is the one with the least weighted sum of squared errors over the widths,
   found exactly.
2. *Refit.* With the codes fixed, the best scales and zeros of each width are a least-squares problem per row, solved in closed
   form with the same Hessian, so that errors of one group can make up for those of another.
3. *One more sweep.* With the grids fixed, every column in turn takes the best code given all others; then refit again.

`weights` says how much each width counts, `feedback: mean` and `refit: 0` give the published method (MatGPTQ, arXiv 2602.03537).
The ledger lists every tensor's error at every width, and the perplexity of every width on text kept out of the calibration.
"""


def main(arguments: list[str]) -> int:
    """0 when all pages are up to date, or have been written."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run python scripts/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    if arguments:
        print(f"unknown arguments {' '.join(arguments)}; the only one is --check", file=sys.stderr)
        return 2
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    docs = ROOT / "docs"
    return {
        docs / "cli.md": cli_page(),
        docs / "methods.md": methods_page(),
        docs / "composition.md": composition_page(),
    }


def cli_page() -> str:
    """The help of `anybit` and of each command."""
    sections = [f"## anybit {name}\n\n{_block(help_text(*name.split()))}" for name, _, _ in COMMANDS]
    return "\n".join([CLI_HEAD, NOTE, "", _block(help_text()), *sections])


def help_text(*command: str) -> str:
    """What `anybit COMMAND --help` prints, at a fixed width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with redirect_stdout(io.StringIO()) as out:
            anybit([*command, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return out.getvalue().strip()


def methods_page() -> str:
    """One row per recipe."""
    recipes = list_recipes()
    rows = [
        [f"`{r['name']}`", r["weights"], r["activations"], r["kv"], ", ".join(r["needs"]) or "nothing", r["paper"]]
        for r in recipes
    ]
    table = [
        _row(["recipe", "weights", "activations", "KV cache", "needs", "paper"]),
        _row(["---"] * 6),
        *map(_row, rows),
    ]
    summaries = [f"- **{r['name']}**: {r['summary']}." for r in recipes]
    return "\n".join([METHODS_HEAD, NOTE, "", *table, "", *summaries, "", NESTED])


def composition_page() -> str:
    """Every pair of stages, with the reason where they do not go together."""
    stages = {
        "transform": TRANSFORMS, "learn": LEARNERS, "weights": METHODS, "activations": ACTIVATIONS, "compensate": COMPENSATIONS
    }  # fmt: skip
    steps = [(f"{stage}: {name}", kind()) for stage, table in stages.items() for name, kind in table.items()]
    reasons: list[str] = []
    rows = []
    for at, (name, first) in enumerate(steps):
        cells = []
        for beside, (_, second) in enumerate(steps):
            stage = stage_of(name)
            alike = stage == stage_of(steps[beside][0])
            shown = stage == "transform" if alike else beside > at
            cells.append(_mark(reason(first, second), reasons) if shown else "")
        rows.append([name, *cells])
    numbered = [f"{number}. {text}." for number, text in enumerate(reasons, 1)]
    head = ["", *(str(number) for number in range(1, len(steps) + 1))]
    labelled = [[f"{number}. {row[0]}", *row[1:]] for number, row in enumerate(rows, 1)]
    table = [_row(head), _row(["---"] * len(head)), *map(_row, labelled)]
    return "\n".join([COMPOSITION_HEAD, NOTE, "", *table, "", "Refused, with the reason:", "", *numbered, ""])


def stage_of(name: str) -> str:
    """`weights: rtn` is of stage `weights`."""
    return name.partition(":")[0]


def _mark(found: str, reasons: list[str]) -> str:
    """`+`, or the number of the reason, which is added if it is new."""
    if found and found not in reasons:
        reasons.append(found)
    return f"no ({reasons.index(found) + 1})" if found else "+"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
