"""The compiled module runs on any x86-64: no instruction of a higher set is reachable without asking the CPU first; and
importing anybit is quick."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VECTOR = re.compile(r"^\s+[0-9a-f]+:\s+v\w+\s|%[yz]mm|%k[1-7]\b|%tmm")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
PER_TARGET = re.compile(r"anybit::(avx2|avx512|amx)::")


def functions_with_vector_instructions(disassembly: str) -> set[str]:
    """Functions outside the per-target namespaces that hold an AVX, AVX-512 or AMX instruction."""
    found, function = set(), ""
    for line in disassembly.splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
        elif not PER_TARGET.search(function) and VECTOR.search(line):
            found.add(function)
    return found


def test_the_search_finds_what_it_should():
    listing = """
0000000000001000 <anybit::avx2::(anonymous namespace)::dot(float)>:
    1000:\tvaddps %ymm0,%ymm1,%ymm2
0000000000002000 <anybit::parallel_for(unsigned long)>:
    2000:\tmovaps %xmm0,(%rdi)
0000000000003000 <std::vector<float>::~vector()>:
    3000:\tvmovups %xmm0,(%rdi)
0000000000004000 <anybit::attend(int)>:
    4000:\tkmovq  %rax,%k1
"""
    assert functions_with_vector_instructions(listing) == {"std::vector<float>::~vector()", "anybit::attend(int)"}


def released_objects() -> list[str]:
    """Object files of the newest release build in this checkout; the module itself is stripped of names."""
    modules = (Path(__file__).parents[2] / "build").glob("*/_native*.so")
    newest = max(modules, key=lambda path: path.stat().st_mtime, default=None)
    return sorted(str(path) for path in newest.parent.rglob("*.cpp.o")) if newest else []


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump on x86-64")
def test_higher_instruction_sets_stay_in_their_namespaces():
    """A template or inline function that two targets share is merged by the linker: the AVX-512 copy may win."""
    objects = released_objects()
    if not objects:
        pytest.skip("no build folder in this checkout")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", *objects]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "<anybit::avx512::" in listing
    assert "<anybit::linear_w_a8(" in listing
    assert functions_with_vector_instructions(listing) == set()


@pytest.mark.parametrize("what", ["anybit", "anybit.cli", "anybit.kernels.native"])
def test_our_own_share_of_the_import_time(what):
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {what}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(anybit[\w.]*)", done.stderr)
    assert what in {name for _, name in rows}
    assert sum(int(microseconds) for microseconds, _ in rows) < 2e6
