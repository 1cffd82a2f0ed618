"""The Triton kernels compile for real GPUs, to machine code with matrix instructions; no GPU is needed for that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (there are no wheels for this platform)", allow_module_level=True)

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anybit.kernels.linear_w_a16 import triton as kernels

types = dict(x="*bf16", y="*fp32", cell="*i32", planes="*u8", first="*fp16", starts="*i64", factors="*fp32")
sizes = dict.fromkeys(("N", "K", "KB", "G", "group", "T"), "i32")
found = []
for kind, number in kernels.KINDS.items():
    second = {"second": "*fp16" if kind == "binary_coded" else "*u8"}
    for kernel, constants in (
        (kernels._skinny, dict(KIND=number, M=1, BN=16, BK=256)),
        (kernels._skinny, dict(KIND=number, M=8, BN=16, BK=256)),
        (kernels._gemm, dict(KIND=number, BM=64, BN=64, BK=64, UNITS=True)),
    ):
        signature = {name: {**types, **sizes, **second}.get(name, "constexpr") for name in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", int(sys.argv[1]), 32))
        ptx = built.asm["ptx"]
        found.append([kernel.fn.__name__, kind, len(built.asm["cubin"]) > 0, "mma" in ptx, "wgmma" in ptx, ".local" in ptx])
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_for(capability: int) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    for name, kind, cubin, matrix, hopper, spilled in found:
        product = name == "_gemm"
        assert (cubin, spilled, matrix, hopper) == (True, False, product, product and capability == 90), (name, kind)
