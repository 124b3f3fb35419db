"""The Triton twins of the kernels one folder up, one file each. Only the dispatch in those files imports them, so that
a CPU needs no triton.
"""
