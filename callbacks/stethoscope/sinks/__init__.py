"""Sinks write records and findings somewhere."""

from stethoscope.sinks._console import Console as Console
from stethoscope.sinks._jsonl import Jsonl as Jsonl
from stethoscope.sinks._lines import Delivery as Delivery
from stethoscope.sinks._logger import Logger as Logger
from stethoscope.sinks._memory import Memory as Memory
from stethoscope.sinks._read import read as read
from stethoscope.sinks._read import read_run as read_run
from stethoscope.sinks._resolve import resolve as resolve
from stethoscope.sinks._tensorboard import TensorBoard as TensorBoard
from stethoscope.sinks._wandb import WandB as WandB
from stethoscope.sinks._wrappers import Every as Every
from stethoscope.sinks._wrappers import OnRank as OnRank
