"""The machine's limits: plausible, complete, and really beyond the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anybit.kernels import native
from anybit.kernels.machine import op


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    module = native.loaded()
    isa, threads = module.isa(), module.threads()
    yield
    module.set_isa(isa)
    module.set_threads(threads)


@pytest.mark.parametrize("isa", native.loaded().available_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_has_limits(isa: str, threads: int) -> None:
    module = native.loaded()
    module.set_isa(isa)
    module.set_threads(threads)
    peaks = op.measure_peaks(torch.ones(64 << 20, dtype=torch.uint8), rounds=1)
    assert 1e8 < peaks.read_bytes < 1e13
    assert (peaks.int8_vector > 0) == (isa != "scalar")
    assert (peaks.int8_tiles > 0) == (peaks.bf16_tiles > 0) == (isa == "amx")
    assert peaks.int8 == max(peaks.int8_vector, peaks.int8_tiles)


def test_twice_the_work_takes_twice_as_long() -> None:
    """The compiler has not removed the loops: the rate does not depend on the number of steps."""
    if native.isa() == "scalar":
        pytest.skip("scalar has no multiply-add loop")
    short = max(op.multiply_add_peak("int8_vector", 1 << 15) for _ in range(5))
    long = max(op.multiply_add_peak("int8_vector", 1 << 18) for _ in range(5))
    assert 0.2 < long / short < 5
    assert long < 1e15  # a removed loop would be beyond any processor


@pytest.mark.parametrize(
    "buffer", [torch.ones(1 << 20), torch.ones(1000, dtype=torch.uint8), torch.ones(2, 1 << 20).byte()]
)
def test_buffers_that_do_not_fit_are_refused(buffer: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        op.read_bandwidth(buffer)
