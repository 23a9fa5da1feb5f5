"""Quantized weights: packed for the CPU, by torchao on CUDA."""
