"""The size budget: small files, small functions. Prints the measures and fails, naming the file, when one is over.

Run: python scripts/check_sizes.py [ROOT]
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

LONGEST_FILE = 600
MEDIAN_FILE = 150
LIMITS = {"src/anybit/pipeline.py": 150}  # the file a newcomer reads first
SOURCES = ("src", "native", "tests", "scripts", "benchmarks", "examples")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def source_files(root: Path) -> list[Path]:
    """Every source file of the project, sorted."""
    return sorted(p for part in SOURCES for p in (root / part).rglob("*") if p.suffix in SUFFIXES)


def lines(path: Path) -> int:
    """Lines of a text file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def function_lengths(root: Path) -> list[int]:
    """Lines of every function of the package, decorators not counted."""
    found = []
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((node.end_lineno or node.lineno) - node.lineno + 1)
    return sorted(found)


def violations(root: Path) -> list[str]:
    """One line for every broken limit."""
    sizes = {path.relative_to(root).as_posix(): lines(path) for path in source_files(root)}
    limits = {name: LIMITS.get(name, LONGEST_FILE) for name in sizes}
    found = [f"{name}: {size} lines, at most {limits[name]}" for name, size in sizes.items() if size > limits[name]]
    package = [size for name, size in sizes.items() if name.startswith("src/") and size > 1]
    if package and statistics.median(package) >= MEDIAN_FILE:
        found.append(f"src: median file has {statistics.median(package):g} lines, must stay below {MEDIAN_FILE}")
    return found


def summary(root: Path) -> str:
    """Median and longest file, 95th percentile and longest function."""
    package = [lines(path) for path in (root / "src").rglob("*.py") if lines(path) > 1]
    functions = function_lengths(root)
    p95 = functions[min(len(functions) - 1, int(len(functions) * 0.95))]
    return (
        f"package files: {len(package)}, median {statistics.median(package):g}, longest {max(package)} lines; "
        f"functions: {len(functions)}, p95 {p95}, longest {functions[-1]} lines"
    )


def main(arguments: list[str]) -> int:
    """0 when every limit holds."""
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    print(summary(root))
    broken = violations(root)
    for line in broken:
        print(f"size budget: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
