"""Kernels in CUDA C++ for GPUs whose own instructions Triton does not reach: compiled at run time, launched through the
driver.
"""
