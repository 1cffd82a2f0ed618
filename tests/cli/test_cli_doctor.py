"""The checks of doctor pass on a good build, and notice a bad one."""

from __future__ import annotations

import json

import pytest
import torch

from anybit.cli import checks
from anybit.formats.planes import pack, unpack
from anybit.kernels import native


def test_the_golden_planes_are_what_the_definition_says():
    codes, planes = torch.tensor(checks.GOLDEN_CODES), torch.tensor(checks.GOLDEN_PLANES)
    assert torch.equal(pack(codes.byte(), checks.GOLDEN_BITS), planes.byte())
    assert torch.equal(unpack(planes.byte(), codes.shape[1]), codes.byte())


@pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
@pytest.mark.parametrize("name", ["native_module", "golden_planes", "native_planes", "linear_kernels"])
def test_kernel_checks_pass_here(name):
    assert getattr(checks, name)()


@pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")
def test_a_wrong_kernel_is_noticed(monkeypatch):
    monkeypatch.setattr(checks, "GOLDEN_CODES", [[5, 2, 7, 0, 1, 6, 3, 4, 4], [0] * 8 + [2]])
    with pytest.raises(checks.CheckError, match="packs the golden codes wrongly"):
        checks.golden_planes()


def test_too_little_disk_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path))
    assert "GB free" in checks.disk_space()
    monkeypatch.setattr(checks, "ROOM", 10**18)
    with pytest.raises(checks.CheckError, match="GB free in"):
        checks.disk_space()


def test_doctor_json_is_the_contract(anybit):
    done = anybit("doctor", "--json")
    data = json.loads(done.out)
    assert set(data) == {"ok", "checks"}
    assert all({"name", "ok", "detail", "fix"} == check.keys() for check in data["checks"])
    assert all(bool(check["fix"]) != check["ok"] for check in data["checks"])
    assert data["ok"] == all(check["ok"] for check in data["checks"])
    assert done.code == (0 if data["ok"] else 3)
