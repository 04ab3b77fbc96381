"""stethoscope listens to a PyTorch model while it trains and says what is wrong, where, since when, and what to try."""

from stethoscope._record import Finding as Finding
from stethoscope._record import Record as Record
from stethoscope._record import Report as Report
