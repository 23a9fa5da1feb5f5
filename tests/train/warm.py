"""Imported once by the server that the tests' processes are forked from: what each of them would else wait for."""

import torch
import torch._dynamo  # torch's optimizers import it on first use

import neox.cli
import neox.train  # noqa: F401
from neox.system.device import matmul_flops

torch.set_num_threads(1)
matmul_flops(torch.device("cpu"), "fp32")
