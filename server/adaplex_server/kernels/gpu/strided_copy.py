"""Copies from pinned memory straight to rows that lie apart on the device, by the copy engine alone.

torch copies to such places by way of a kernel, which takes multiprocessors from the step that runs meanwhile; the
driver's two-dimensional copy does not.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

_HOST, _DEVICE = 1, 2
_MAX_PITCH = (1 << 31) - 1


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's interface."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_kind", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_void_p),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_kind", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_void_p),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


def copy_rows(rows: torch.Tensor, pinned: torch.Tensor) -> None:
    """rows [R, ...] on a GPU, each row contiguous, rows apart by the first stride; pinned: the same shape, contiguous,
    pinned, and not to be changed before the current stream is through. Does not wait.
    """
    assert rows.shape == pinned.shape and rows.dtype == pinned.dtype and rows[0].is_contiguous()
    assert pinned.is_contiguous() and pinned.is_pinned() and rows.is_cuda
    pitch = rows.stride(0) * rows.element_size()
    if pitch > _MAX_PITCH:
        for row, values in zip(rows, pinned, strict=True):
            row.copy_(values, non_blocking=True)
        return
    width = rows[0].numel() * rows.element_size()
    copy = _Copy2D(
        src_kind=_HOST,
        src_host=pinned.data_ptr(),
        src_pitch=width,
        dst_kind=_DEVICE,
        dst_device=rows.data_ptr(),
        dst_pitch=pitch,
        width=width,
        height=rows.shape[0],
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(rows.device).cuda_stream)
    result = _driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), stream)
    if result != 0:
        raise RuntimeError(f"the CUDA driver refused a copy of {tuple(rows.shape)} with error {result}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
