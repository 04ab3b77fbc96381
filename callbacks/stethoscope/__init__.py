"""stethoscope listens to a PyTorch model while it trains and says what is wrong, where, since when, and what to try.

Each name is imported when it is first asked for: the command line, its help and its tab completion answer without torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from stethoscope import audits as audits
    from stethoscope import presets as presets
    from stethoscope import probes as probes
    from stethoscope import sinks as sinks
    from stethoscope import testing as testing
    from stethoscope import watches as watches
    from stethoscope._monitor import Monitor as Monitor
    from stethoscope._record import Finding as Finding
    from stethoscope._record import FindingsError as FindingsError
    from stethoscope._record import Record as Record
    from stethoscope._record import Report as Report

_HOMES = {
    "Monitor": "_monitor",
    **dict.fromkeys(("Finding", "FindingsError", "Record", "Report"), "_record"),
    **{package: package for package in ("audits", "presets", "probes", "sinks", "testing", "watches")},
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = home if name == _HOMES[name] else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
