"""Run by Python itself at the start of every process below `stethoscope run`, before the script: `site` looks for this name.

The folder leaves `sys.path` at once, and the environment's own `sitecustomize`, if there is one, gets its turn.
"""

import sys
from pathlib import Path

_here = str(Path(__file__).parent)
sys.path[:] = [folder for folder in sys.path if folder != _here]
sys.modules.pop("sitecustomize", None)
try:
    from stethoscope.integrations._script import _start
except ImportError:  # another interpreter, started by the script, that has no stethoscope
    pass
else:
    _start.begin()
import sitecustomize  # noqa: E402, F401  # the environment's own; site expects the error where there is none
