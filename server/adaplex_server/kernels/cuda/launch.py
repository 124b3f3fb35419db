"""Kernels of compiled modules launched through the CUDA driver, on torch's current stream, so that a captured graph
holds them.

The driver is called itself for programmatic dependent launch (NVIDIA, "CUDA C++ Programming Guide"): a launch may
begin, and fetch what no other kernel writes, before the one in front has ended. Every kernel launched here must
therefore wait (`griddepcontrol.wait`) before it reads another's result or writes anything, in every block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from adaplex_server.kernels.cuda.compiler import compiled

_PROGRAMMATIC_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED = 8
_BFLOAT16 = 9
_SWIZZLE_128B = 3
_PROMOTE_256B = 3


class DriverError(RuntimeError):
    """The CUDA driver refused a call of this package."""


Argument = ctypes.Structure | ctypes.c_int | ctypes.c_void_p


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("flag", ctypes.c_int))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """The driver's description of a matrix [rows, columns] of bfloat16 that is fetched in boxes, by value."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class Kernel:
    """A kernel of one device. threads: of a block. Made before a stream is captured: making one compiles and loads."""

    def __init__(
        self, source: str, name: str, constants: Mapping[str, int], threads: int, device: torch.device
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        code = compiled(source, constants, f"sm_{major}{minor}a")
        self._name = name
        self._threads = threads
        self._device = device
        self._function = ctypes.c_void_p()
        with torch.cuda.device(device):
            _enter_context(device)
            module = ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "load a module")
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"find {name}")
            self._shared = _constant(module, f"{name}_shared_bytes")
            given = _driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, self._shared)
            _check(given, f"give {name} {self._shared} bytes of shared memory")
        self._attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION)
        self._attribute.value.flag = 1

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        """On the current stream of the device."""
        _enter_context(self._device)
        config = _Config(
            grid=grid,
            block=(self._threads, 1, 1),
            shared_bytes=self._shared,
            stream=torch.cuda.current_stream(self._device).cuda_stream,
            attributes=ctypes.pointer(self._attribute),
            attribute_count=1,
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), f"launch {self._name}")


def tensor_map(matrix: torch.Tensor, box_rows: int) -> TensorMap:
    """Boxes of box_rows rows and 64 columns, swizzled by 128 bytes, zero outside the matrix [rows, columns] bfloat16,
    whose rows are contiguous, begin at multiples of 16 bytes and may lie apart.
    """
    rows, columns = matrix.shape
    # The driver writes to addresses that are multiples of 64.
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    at = -(-ctypes.addressof(memory) // 64) * 64
    result = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        _BFLOAT16,
        2,
        ctypes.c_void_p(matrix.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)((matrix.stride(0) if rows > 1 else columns) * 2),
        (ctypes.c_uint32 * 2)(64, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        0,
    )
    _check(result, f"describe a matrix {tuple(matrix.shape)} with strides {matrix.stride()}")
    return TensorMap.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(TensorMap)))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """As a kernel's argument."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _enter_context(device: torch.device) -> None:
    """A thread that has only used torch's cached memory may have no context yet; it gets the one that torch uses."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "ask for the context")
    if context.value is None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index), "get the context")
        _check(_driver().cuCtxSetCurrent(context), "enter the context")


def _constant(module: ctypes.c_void_p, name: str) -> int:
    """A module's integer; 0 if it has none of this name."""
    address, size, value = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_int()
    if _driver().cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, name.encode()) != 0:
        return 0
    _check(_driver().cuMemcpyDtoH_v2(ctypes.byref(value), address, ctypes.c_size_t(4)), f"read {name}")
    return value.value


def _check(result: int, doing: str) -> None:
    if result == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(result, ctypes.byref(text))
    raise DriverError(f"could not {doing}: {(text.value or b'unknown').decode()} ({result})")
