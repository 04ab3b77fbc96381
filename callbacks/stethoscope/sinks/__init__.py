"""Sinks write records and findings somewhere."""

from stethoscope.sinks._memory import Memory as Memory
from stethoscope.sinks._wrappers import Every as Every
from stethoscope.sinks._wrappers import OnRank as OnRank
