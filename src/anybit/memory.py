"""Memory of this process, as the operating system counts it.

Read from /proc/self/status where it exists: the maximum of `resource.getrusage` is inherited from the parent across
exec, so a small process started by a large one would report the large one's peak.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes.

    Raises:
        OSError: no /proc on this system.
    """
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started or since `reset_peak`, in bytes."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Start a new peak measurement from the present size (Linux; OSError elsewhere)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
