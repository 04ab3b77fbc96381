"""The causality audit, from the question to the culprit.

`_audit` (the public function) -> `_setup` (axes, rates, batch) -> `_examine` (one mode: `_perturb` decides, `_opinions`
ask NaN and gradients) -> `_accuse` (`_culprit` finds suspects among modules, `_operations` the source line, `_why` the
words) -> `_report`. `_inputs` changes inputs, `_repeat` calls the model, `_axes` finds time in tensors.
"""

from stethoscope.audits._causality._audit import causality as causality
from stethoscope.audits._causality._report import CausalityReport as CausalityReport
from stethoscope.audits._causality._report import ModeVerdict as ModeVerdict
