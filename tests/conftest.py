"""One thread: the models are tiny, and the machine may be busy."""

import torch

torch.set_num_threads(1)
