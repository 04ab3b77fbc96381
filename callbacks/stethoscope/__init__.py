"""stethoscope listens to a PyTorch model while it trains and says what is wrong, where, since when, and what to try."""

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
