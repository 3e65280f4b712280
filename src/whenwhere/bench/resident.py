"""How much a process grows while something runs, as Linux tells it in /proc."""

import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5): sets the highest resident size to the present one


def begin() -> int | None:
    """Forget the highest resident size; the present one in bytes, or `None` where the system has no such thing."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    return _read("VmRSS")


def grown(start: int | None) -> int | None:
    """By how many bytes the process was larger than at `start`, at most, since `begin`."""
    highest = _read("VmHWM") if start is not None else None
    return None if highest is None or start is None else max(0, highest - start)


def _read(name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
