"""CUDA C++ sources of this package to machine code, at run time: NVRTC, which every CUDA build of torch brings along.

Owns the cache of compiled code: a file a kernel in the user's cache folder, named by a hash of everything that went
in, so that a later start compiles nothing. NVRTC is called through ctypes; its interface is stable within a major
version of CUDA (NVIDIA, "NVRTC", chapter 3).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

_HERE = Path(__file__).parent


class CompilationError(RuntimeError):
    """NVRTC refused a source of this package, or cannot be found: a fault of the installation."""


def compiled(source: str, constants: Mapping[str, int], arch: str) -> bytes:
    """The cubin of a .cu file of this package with the constants defined. arch: such as sm_90a."""
    text = (_HERE / "hopper.cuh").read_text() + (_HERE / source).read_text()
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in constants.items())]
    key = hashlib.sha256("\0".join([text, *options, str(torch.version.cuda)]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(source).stem}-{key}.cubin"
    if path.exists():
        return path.read_bytes()
    code = _compile(text, source, options)
    _keep(path, code)
    return code


def cache_folder() -> Path:
    """Where compiled code is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "adaplex" / "cuda"


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all, also when several processes start together. A folder that cannot be written costs only
    time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        return


@cache
def _nvrtc() -> ctypes.CDLL:
    major = str(torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}"]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        names += [str(path) for path in sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilationError(f"NVRTC of CUDA {major} was not found (tried {', '.join(names)}); reinstall torch")


def _compile(text: str, name: str, options: list[str]) -> bytes:
    library = _nvrtc()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None), "create")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), array) != 0:
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise CompilationError(f"{name} does not compile with {options}:\n{log.decode(errors='replace')}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "ask for a size")
    data = ctypes.create_string_buffer(size.value)
    _check(read(program, data), "read")
    return data.raw


def _check(result: int, doing: str) -> None:
    if result != 0:
        raise CompilationError(f"NVRTC failed to {doing}: error {result}")
