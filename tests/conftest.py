"""One thread unless a test sets more: on a busy machine, the threads of small operations wait for each other."""

import torch

torch.set_num_threads(1)
