"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._activation_health import ActivationHealth as ActivationHealth
from stethoscope.watches._answer_health import AnswerHealth as AnswerHealth
from stethoscope.watches._assignment import Assignment as Assignment
from stethoscope.watches._batch_order import BatchOrder as BatchOrder
from stethoscope.watches._class_health import ClassHealth as ClassHealth
from stethoscope.watches._gradient_health import GradientHealth as GradientHealth
from stethoscope.watches._input_health import InputHealth as InputHealth
from stethoscope.watches._inputdrift import InputDrift as InputDrift
from stethoscope.watches._jumps import Jumps as Jumps
from stethoscope.watches._learning_rate import LearningRate as LearningRate
from stethoscope.watches._loss_input import LossInput as LossInput
from stethoscope.watches._metric_field import Field as Field
from stethoscope.watches._metric_monitors import unknown_monitors as unknown_monitors
from stethoscope.watches._metric_ranks import names_by_rank as names_by_rank
from stethoscope.watches._metric_ranks import rank_differences as rank_differences
from stethoscope.watches._metric_schema import MetricSchema as MetricSchema
from stethoscope.watches._nonfinite import NonFinite as NonFinite
from stethoscope.watches._output_collapse import OutputCollapse as OutputCollapse
from stethoscope.watches._overfit import Overfit as Overfit
from stethoscope.watches._parameter_health import ParameterHealth as ParameterHealth
from stethoscope.watches._plateau import Plateau as Plateau
from stethoscope.watches._result_health import ResultHealth as ResultHealth
from stethoscope.watches._sparsity import Sparsity as Sparsity
from stethoscope.watches._target_health import TargetHealth as TargetHealth
