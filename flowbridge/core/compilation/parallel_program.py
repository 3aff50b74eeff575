"""A compiled program on several cores: pieces of a batch run at the same time, each by a thread of its own.

The loader that torch has for Python keeps the interpreter's lock while a program runs. A program's library can also be called
through the C interface that torch keeps stable for this purpose (``aoti_runtime/interface.h`` and ``aoti_torch/c/shim.h``);
foreign functions are called without the lock, so two threads take half the time of one.
"""

from __future__ import annotations

import ctypes
import os
import weakref
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CompilationError
from ..potential import EnergyAndForces

LIBRARY = "program.so"
"""Name of the program's library in its folder."""

_FUNCTIONS = (
    "aoti_torch_create_tensor_from_blob",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_numel",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_device_type_cpu",
)

_THROUGH_THE_LOADER = b"aoti_torch_proxy_executor_call_function"

_Handle = ctypes.c_void_p


def extract_library(package: Path) -> Path | None:
    """Put the library of a package next to it; return None where it cannot be called without torch's loader.

    That is so where it calls operations through the loader (those that have no C function, such as ``linalg.inv``).
    """
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        content = archive.read(names[0]) if len(names) == 1 else _THROUGH_THE_LOADER
    if _THROUGH_THE_LOADER in content:
        return None
    target = package.with_name(LIBRARY)
    target.write_bytes(content)
    return target


def _torch_library() -> ctypes.CDLL | None:
    """Return torch's library, if it has the functions needed (here, on Linux)."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    return library if all(hasattr(library, name) for name in _FUNCTIONS) else None


_torch = _torch_library()


def _functions() -> ctypes.CDLL:
    """Return torch's library, or raise the CompilationError that says how to do without."""
    if _torch is None:
        raise CompilationError(
            "torch's C functions cannot be called on this platform, so programs cannot share its cores: compile for a batch "
            "below 16, or evaluate with compilation='never'"
        )
    return _torch


class ParallelProgram:
    """The program of a folder, for batches of any length on the CPU.

    Args:
        folder: holds the program's library.
        batch: configurations of one call of the program.
        particles: of a configuration.
        dtype: of the positions that it takes.
        workers: how many calls run at once.

    Raises:
        CompilationError: when the library cannot be loaded, or cannot be called on this platform.
    """

    def __init__(self, folder: Path, batch: int, particles: int, dtype: torch.dtype, workers: int) -> None:
        _functions()
        self.batch, self.workers = batch, workers
        self._shape = (batch, particles, 3)
        self._dtype = dtype
        try:
            self._library = ctypes.CDLL(str(folder / LIBRARY))
        except OSError as error:
            raise CompilationError(f"the compiled program in {folder} cannot be loaded: {error}") from error
        handle = _Handle()
        self._must(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(handle), ctypes.c_size_t(workers), b"cpu", None
            )
        )
        self._container = handle
        self._finalizer = weakref.finalize(self, self._library.AOTInductorModelContainerDelete, handle)
        self._pool: ThreadPoolExecutor | None = None
        self._process = -1

    @staticmethod
    def possible(folder: Path) -> bool:
        """Return whether the program of a folder can be called this way."""
        return _torch is not None and (folder / LIBRARY).is_file()

    def evaluate(self, positions: Tensor, rest: Sequence[Tensor]) -> EnergyAndForces:
        """Return energies ``(B,)`` and forces ``(B, N, 3)``, float64.

        Args:
            positions: ``(B, N, 3)``, B at least 1.
            rest: for a periodic potential the cell ``(B, 3, 3)``, then global parameters, 0-dimensional.
        """
        count = len(positions)
        energies = torch.empty(count, dtype=torch.float64)
        forces = torch.empty(count, *self._shape[1:], dtype=torch.float64)
        starts = range(0, count, self.batch)

        def piece(start: int) -> None:
            stop = min(start + self.batch, count)
            inputs = [self._input(positions[start:stop])]
            inputs += [tensor if tensor.dim() == 0 else self._input(tensor[start:stop]) for tensor in rest]
            self._call(inputs, energies[start:stop], forces[start:stop])

        if len(starts) == 1 or self.workers == 1:
            for start in starts:
                piece(start)
        else:
            for _ in self._threads().map(piece, starts):
                pass  # errors are raised here
        return EnergyAndForces(energies, forces)

    def _input(self, part: Tensor) -> Tensor:
        missing = self.batch - len(part)
        if missing:
            part = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        return part.to(self._dtype).contiguous()

    def _call(self, inputs: list[Tensor], energies: Tensor, forces: Tensor) -> None:
        """Run the program once and copy the first results to where they belong."""
        handles = (_Handle * len(inputs))(*(_borrowed(tensor) for tensor in inputs))  # the call takes them over
        results = (_Handle * 2)()
        self._must(
            self._library.AOTInductorModelContainerRun(
                self._container, handles, ctypes.c_size_t(len(inputs)), results, ctypes.c_size_t(2), None, None
            )
        )
        functions = _functions()
        numbers = (self.batch, self.batch * self._shape[1] * 3)
        for result, target, expected in zip(results, (energies, forces), numbers, strict=True):
            address, number = ctypes.c_void_p(), ctypes.c_int64()
            functions.aoti_torch_get_data_ptr(_Handle(result), ctypes.byref(address))
            functions.aoti_torch_get_numel(_Handle(result), ctypes.byref(number))
            if number.value == expected:
                ctypes.memmove(target.data_ptr(), address, 8 * target.numel())
            functions.aoti_torch_delete_tensor_object(_Handle(result))
            if number.value != expected:
                raise CompilationError(f"the compiled program gave {number.value} numbers instead of {expected}")

    def _must(self, status: int) -> None:
        if status:
            message = ctypes.c_char_p()
            self._library.AOTInductorGetLastError(ctypes.byref(message))
            text = message.value.decode(errors="replace") if message.value else "no reason given"
            raise CompilationError(f"the compiled program failed: {text}")

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.workers, "flowbridge-program", initializer=_alone)
            self._process = os.getpid()
        return self._pool


def _alone() -> None:
    """Let the matrix library in this thread start no threads of its own; the setting of other threads stays."""
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        if hasattr(_torch, name):
            getattr(_torch, name)(1)


def _borrowed(tensor: Tensor) -> int | None:
    """Return a handle to a view of a CPU tensor's memory; the tensor has to outlive it."""
    functions = _functions()
    kind = (
        functions.aoti_torch_dtype_float64() if tensor.dtype == torch.float64 else functions.aoti_torch_dtype_float32()
    )
    rank = tensor.dim()
    handle = _Handle()
    status = functions.aoti_torch_create_tensor_from_blob(
        ctypes.c_void_p(tensor.data_ptr()),
        ctypes.c_int64(rank),
        (ctypes.c_int64 * rank)(*tensor.shape),
        (ctypes.c_int64 * rank)(*tensor.stride()),
        ctypes.c_int64(0),
        ctypes.c_int32(kind),
        ctypes.c_int32(functions.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
    )
    if status:
        raise CompilationError("torch cannot wrap the memory of an input")
    return handle.value
