"""Resident memory follows what the process really touches."""

import sys

import pytest

from anybit.memory import peak_rss_bytes, reset_peak, rss_bytes

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_remembers_what_the_present_forgets():
    before = rss_bytes()
    reset_peak()
    block = bytearray(b"\1" * (200 * MEGABYTE))
    assert rss_bytes() - before > 180 * MEGABYTE
    del block
    assert rss_bytes() - before < 100 * MEGABYTE
    assert peak_rss_bytes() - before > 180 * MEGABYTE
    reset_peak()
    assert peak_rss_bytes() - before < 100 * MEGABYTE
