"""Kernels, one a file: docstring, plain-torch reference, Triton implementation, and the choice between them.

The choice is by device: CUDA tensors run Triton, all others the reference (or torch's own quantized operators).
"""
