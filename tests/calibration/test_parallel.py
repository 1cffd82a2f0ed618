"""Workers keep order, stay single-threaded and gradient-free, and put everything back."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from anybit.calibration.parallel import workers


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(threads):
    def slow_first(i):
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    with workers(threads) as pool:
        assert pool.map(slow_first, range(9)) == [i * i for i in range(9)]


def test_tasks_do_run_at_once():
    barrier = threading.Barrier(2, timeout=10)
    with workers(2) as pool:
        pool.map(lambda _: barrier.wait(), range(2))  # one thread alone would wait for ever


def test_torch_is_single_threaded_and_without_gradients_inside_and_as_before_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers(2) as pool:
            inside = pool.map(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(4))
            assert set(inside) == {(1, False)}
            assert (torch.get_num_threads(), torch.is_grad_enabled()) == (1, False)
        assert (torch.get_num_threads(), torch.is_grad_enabled()) == (2, True)
        with pytest.raises(ValueError, match="mine"), workers(1):
            raise ValueError("mine")
        assert (torch.get_num_threads(), torch.is_grad_enabled()) == (2, True)
    finally:
        torch.set_num_threads(before)


def test_the_first_failure_is_raised():
    def task(i):
        if i in (2, 5):
            raise ValueError(f"task {i}")
        return i

    with workers(2) as pool, pytest.raises(ValueError, match="task 2"):
        pool.map(task, range(8))


def test_threads_end_with_the_block():
    before = threading.active_count()
    with workers(3) as pool:
        pool.map(time.sleep, [0.01] * 6)
        assert threading.active_count() > before
    assert threading.active_count() == before
