"""Choosing an instruction set, living without the native module, surviving fork, and the C++ tests under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anybit.kernels.native import native

ROOT = Path(__file__).parents[2]

LINEAR = """
import logging; logging.basicConfig(format="%(message)s")
import torch
from anybit.formats.planes import pack
from anybit.kernels import native
from anybit.kernels.linear_w_a16 import op
codes = torch.arange(64, dtype=torch.uint8).view(4, 16) % 16
args = (torch.ones(1, 16), pack(codes, 4), torch.ones(4, 1).half(), None, 16, 16)
for _ in range(2):
    y = op.linear(*args)
assert y.tolist() == [[-8.0, -8.0, -8.0, -8.0]], y
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_an_instruction_set_can_be_forced():
    done = run(LINEAR + "print(native.isa())", ANYBIT_ISA="scalar")
    assert done.stdout == "scalar\n", done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ANYBIT_ISA", "mmx", "ANYBIT_ISA=mmx is unknown; use scalar, avx2, avx512 or amx"),
        ("ANYBIT_THREADS", "many", "ANYBIT_THREADS='many' is not a number from 1 to 256"),
    ],
)
def test_a_wrong_choice_is_an_error_with_the_reason(variable, value, reason):
    done = run(LINEAR, **{variable: value})
    assert done.returncode == 1
    assert f"KernelUnavailable: {reason}" in done.stderr


def test_without_the_module_the_reference_runs_and_says_so_once():
    done = run("import sys; sys.modules['anybit._native'] = None\n" + LINEAR + "print(native.isa())")
    assert done.stdout == "none\n", done.stderr
    assert done.stderr.count("anybit._native is not built: slow PyTorch kernels run") == 1


@pytest.mark.parametrize("team", [1, 2], ids=["workers", "openmp"])
def test_a_forked_child_gets_its_own_threads(team):
    code = f"""
import os
from anybit.kernels import native
core = native.loaded()
core.set_threads(2)
import torch
torch.set_num_threads({team})  # with as many as ours, jobs run on OpenMP's threads, which do not survive a fork
codes = torch.zeros(4096, 4096, dtype=torch.uint8)
planes = torch.ones(1, 4096, 512, dtype=torch.uint8)
def work():
    core.unpack_planes(planes.data_ptr(), codes.data_ptr(), 1, 4096, 4096)
    assert int(codes[:, 0].sum()) == 4096
work()
child = os.fork()
if child == 0:
    codes.numpy()[:] = 0  # PyTorch's own loops would wait for OpenMP threads that the child does not have
    work()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run(code)
    assert done.stdout == "7\n", done.stderr


def test_cpp_tests_pass_under_sanitizers(tmp_path):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not cmake or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler")
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DANYBIT_NATIVE_TEST=ON"]
    for command in (configure, [cmake, "--build", str(tmp_path), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    sources = sorted((ROOT / "native" / "tests").glob("*_test.cpp"))
    assert len(sources) >= 5
    for source in sources:
        done = subprocess.run([str(tmp_path / source.stem)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(f"{isa} ok" in done.stdout for isa in native().available_isas()), done.stdout
