"""Launches that are compiled and not run: what a GPU would be given, on a machine that may have none.

    with compile_only(90) as launches:
        rms_norm(torch.empty(8, 2048, dtype=torch.bfloat16, device="meta"), weight, 1e-6)
    launches[0].compiled.asm["cubin"]

Inside, every launch of a Triton kernel goes through Triton's own front end (specialisation, cache, ptxas) for the
target asked for and stops there. Tensors live on the meta device: they have shapes and dtypes, and no memory. So what
is compiled is what serving launches, argument by argument. What was compiled lies in Triton's cache on disk, where real
launches of the same target find it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime._allocation import _NULL_ALLOCATOR, _allocator
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .ops import KernelError
from .work import Work

# SMs of an H100 SXM, for launches that are chosen by them.
_NUM_SMS = 132


@dataclass(frozen=True)
class Launch:
    """One launch. grid: its programs, by axis; constexprs: by argument name; may_allocate: whether an allocator for
    global scratch was set; printed: what its compilation printed (ptxas's log where knobs.nvidia.dump_ptxas_log is
    set); work: what the kernel declares of this launch (`work`), None where it declares nothing."""

    kernel: JITFunction
    grid: tuple[int, ...]
    constexprs: dict[str, object]
    num_warps: int
    compiled: triton.compiler.CompiledKernel
    may_allocate: bool
    printed: str
    work: Work | None

    @property
    def scratch_bytes(self) -> int:
        """Global memory that each program needs beside its arguments (descriptors that it makes)."""
        return self.compiled.metadata.global_scratch_size


@dataclass(frozen=True)
class Case:
    """A public operation at the sizes of a real model, for the audit; `launch` calls it on tensors of the meta device.

    wide: kernels that must load 16 bytes a thread; weights_per_step: weights that a thread decodes in a step of the
    tile loop, for kernels that have such a loop beside the dense one; weights_per_thread: that it decodes in all, for
    kernels whose code has no loop; accepts: problem → why it is accepted here.
    """

    name: str
    launch: Callable[[], object]
    wide: tuple[JITFunction, ...] = ()
    weights_per_step: int = 0
    weights_per_thread: int = 0
    accepts: dict[str, str] = field(default_factory=dict)


class CompileOnlyDriver(DriverBase):
    """What Triton asks of a driver before it launches. num_sms: what launches that are chosen by it see."""

    def __init__(self, capability: int, num_sms: int = _NUM_SMS) -> None:
        self.capability, self.num_sms = capability, num_sms

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by Triton itself

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> CompileOnlyDriver:
        # The key of a kernel's cache in memory: no real device's, and new in every `compile_only`.
        return self

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise KernelError("a launch that is only compiled has no launcher")

    def get_benchmarker(self) -> Callable:
        raise KernelError("a launch that is only compiled cannot be timed")


def _declared(
    kernel: Any, metadata: Callable | None, grid: tuple[int, ...], compiled: object, args: tuple, kwargs: dict
) -> Work | None:
    """What a kernel declares of one launch."""
    if metadata is None:
        return None
    declared = metadata(grid, compiled, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
    return Work(declared["bytes"], declared["flops"])


@contextmanager
def recorded_work() -> Iterator[list[Work | None]]:
    """While open, launches run as ever, on a GPU or interpreted, and the list has what their kernels declare, None for
    a kernel that declares nothing. Not thread-safe."""
    works: list[Work | None] = []
    kind = InterpretedFunction if triton.knobs.runtime.interpret else JITFunction
    run = kind.run

    def run_and_record(kernel: Any, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object) -> object:
        metadata = kernel.kwargs["launch_metadata"] if kind is InterpretedFunction else kernel.launch_metadata
        works.append(_declared(kernel, metadata, grid, SimpleNamespace(name=kernel.__name__), args, kwargs))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    kind.run = run_and_record
    try:
        yield works
    finally:
        kind.run = run


def work_of(operation: Callable[[], object]) -> Work:
    """What all launches of an operation declare together; it runs, or is compiled where launches only are."""
    with recorded_work() as works:
        operation()
    declared = [work for work in works if work is not None]
    assert len(declared) == len(works), "every kernel declares its work"
    return Work(sum(work.nbytes for work in declared), sum(work.flops for work in declared))


@contextmanager
def compile_only(capability: int, num_sms: int = _NUM_SMS) -> Iterator[list[Launch]]:
    """While open, launches are compiled for sm_<capability>, recorded in the list, and not run. Not thread-safe.

    KernelError where kernels are interpreted: nothing would be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise KernelError("TRITON_INTERPRET is set, so that nothing is compiled; unset it")
    launches: list[Launch] = []
    run, active = JITFunction.run, driver._active

    def compile_and_record(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object):
        with redirect_stdout(io.StringIO()) as printed:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        constants = compiled.src.constants
        names = {i: p.name for i, p in enumerate(kernel.params) if p.is_constexpr}
        constexprs = {names[path[0]]: value for path, value in constants.items() if path[0] in names}
        may_allocate = _allocator.get() is not _NULL_ALLOCATOR
        work = _declared(kernel, kernel.launch_metadata, grid, compiled.metadata, args, kwargs)
        launches.append(
            Launch(
                kernel, grid, constexprs, compiled.metadata.num_warps, compiled, may_allocate, printed.getvalue(), work
            )
        )
        return compiled

    JITFunction.run = compile_and_record
    driver.set_active(CompileOnlyDriver(capability, num_sms))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(active)


@contextmanager
def record_only(capability: int, num_sms: int = _NUM_SMS) -> Iterator[list[Launch]]:
    """`compile_only` without compiling: launches have grid, constexprs, options and work, and no machine code."""
    compile_kernel = JITFunction._do_compile
    JITFunction._do_compile = _not_compiled
    try:
        with compile_only(capability, num_sms) as launches:
            yield launches
    finally:
        JITFunction._do_compile = compile_kernel


def _not_compiled(
    kernel: Any, key: str, signature: Any, device: object, constexprs: dict, options: Any, attrs: Any, warmup: bool
) -> SimpleNamespace:
    """In the place of JITFunction._do_compile: what the record of a launch reads."""
    metadata = SimpleNamespace(num_warps=options.num_warps, launch_pdl=options.launch_pdl, name=kernel.__name__)
    kernel.device_caches[device][0][key] = SimpleNamespace(src=SimpleNamespace(constants=constexprs), metadata=metadata)
    return kernel.device_caches[device][0][key]


def compiled_for(device: torch.device) -> CompileOnlyDriver | None:
    """The driver inside `compile_only`, for tensors on the meta device; None for real ones."""
    active = driver._active
    return active if device.type == "meta" and isinstance(active, CompileOnlyDriver) else None
