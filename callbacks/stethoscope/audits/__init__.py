"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope._schedule import Schedule as Schedule
from stethoscope.audits._audio import AudioReport as AudioReport
from stethoscope.audits._audio import audio as audio
from stethoscope.audits._batch import BatchReport as BatchReport
from stethoscope.audits._batch import batch as batch
from stethoscope.audits._before import BeforeReport as BeforeReport
from stethoscope.audits._before import before as before
from stethoscope.audits._causality import CausalityReport as CausalityReport
from stethoscope.audits._causality import ModeVerdict as ModeVerdict
from stethoscope.audits._causality import causality as causality
from stethoscope.audits._checkpoint import CheckpointReport as CheckpointReport
from stethoscope.audits._checkpoint import checkpoint as checkpoint
from stethoscope.audits._describe import describe as describe
from stethoscope.audits._loading import LoadingReport as LoadingReport
from stethoscope.audits._loading import loading as loading
from stethoscope.audits._metrics import metrics as metrics
from stethoscope.audits._nonfinite import nonfinite as nonfinite
from stethoscope.audits._plan import PlanReport as PlanReport
from stethoscope.audits._plan import plan as plan
from stethoscope.audits._plan import planned_steps as planned_steps
from stethoscope.audits._sparsity import SparsityReport as SparsityReport
from stethoscope.audits._sparsity import sparsity as sparsity
from stethoscope.audits._streaming import StreamingReport as StreamingReport
from stethoscope.audits._streaming import streaming as streaming
from stethoscope.audits._stress import stress as stress
from stethoscope.audits._training import training as training
