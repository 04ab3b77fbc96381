"""Probes read tensors, on the device, without waiting for it."""

from stethoscope.probes._activations import Activations as Activations
from stethoscope.probes._agreement import Agreement as Agreement
from stethoscope.probes._buffers import Buffers as Buffers
from stethoscope.probes._classes import Classes as Classes
from stethoscope.probes._density import Density as Density
from stethoscope.probes._gradients import Gradients as Gradients
from stethoscope.probes._initialisation import Initialisation as Initialisation
from stethoscope.probes._inputs import Inputs as Inputs
from stethoscope.probes._loss_inputs import LossInputs as LossInputs
from stethoscope.probes._optimizers import Optimizers as Optimizers
from stethoscope.probes._parameters import Parameters as Parameters
from stethoscope.probes._separation import Separation as Separation
from stethoscope.probes._units import Units as Units
