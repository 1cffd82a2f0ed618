"""Run a test once per instruction set this CPU has, and restore the choice afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anybit.kernels.native import native

ISAS = ("scalar", "avx2", "avx512", "amx")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    module = native()
    assert module, "anybit._native is not built: the native kernels would go untested"
    if request.param not in module.available_isas():
        pytest.skip(f"this CPU cannot run {request.param}")
    before, threads = module.isa(), module.threads()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)
    module.set_threads(threads)
