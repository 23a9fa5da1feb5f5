"""One thread for every test and every process that a test starts: sums, and so bits, depend on how many there are."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
