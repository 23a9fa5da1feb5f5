"""Weights in fewer bits: packed for the CPU, by torchao on CUDA."""
