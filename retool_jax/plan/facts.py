"""What is known of each program once it is compiled: memory, work, bytes moved, bytes exchanged."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax
from jax.experimental.compilation_cache import compilation_cache

from retool_jax.model import kernels
from retool_jax.plan import flops, hlo
from retool_jax.plan.programs import Program, per_device

BETWEEN_SLICES = 'all-reduce between slices'  # a kind of collective; over the hosts' network
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}


@dataclasses.dataclass(frozen=True)
class Facts:
    """One program on one chip; bytes, unless a field says otherwise."""

    name: str
    phase: str
    arguments: int
    temporaries: int  # and of results that neither take an argument's place nor are a buffer of the phase
    flops: float  # of matmuls, a chip's share
    moved: float  # to and from the chip's memory
    sent: dict[str, float]  # to other chips, by kind of collective
    compile_s: float
    estimated: bool = False  # from shapes alone
    refused: str = ''  # the compiler's words where the program does not fit
    exchanges: int = 0  # collectives of one run
    # Of a program that reads the KV cache: slots of a row that it reads, and what one slot more of every row adds.
    slots: int = 0
    slot_flops: float = 0.0
    slot_moved: float = 0.0
    tile: int = 0  # a kernel reads as many slots as hold tokens, so many together, instead of `slots`; 0: none does

    @property
    def sent_bytes(self) -> float:
        """Over the links of a slice."""
        return sum(n for kind, n in self.sent.items() if kind != BETWEEN_SLICES)

    def at(self, slots: float) -> Facts:
        """The same reading so many slots of a row."""
        more = slots - self.slots
        return dataclasses.replace(
            self,
            flops=self.flops + more * self.slot_flops,
            moved=self.moved + more * self.slot_moved,
            slots=slots,
        )

    def by_length(self, of_kernel: flops.ByLength, devices: int) -> Facts:
        """With what a slot adds where a kernel reads the cache whatever bound there is."""
        if not of_kernel.tile:
            return self
        return dataclasses.replace(
            self,
            tile=of_kernel.tile,
            slot_flops=of_kernel.flops / devices / self.slots,
            slot_moved=of_kernel.moved / devices / self.slots,
        )

    def along(self, shorter: Facts) -> Facts:
        """With what a slot adds, between this and the same program reading fewer."""
        more = self.slots - shorter.slots
        return dataclasses.replace(
            self,
            slot_flops=(self.flops - shorter.flops) / more,
            slot_moved=(self.moved - shorter.moved) / more,
            compile_s=self.compile_s + shorter.compile_s,
        )


def compile_all(programs: Sequence[Program], done: Callable[[str], None], workers: int = 2) -> list[Facts]:
    """Compiles each program for the devices that its shapes lie on; `done` hears the name of each that is ready.
    One that reads the KV cache is compiled with its longest and its shortest reads.

    Tracing holds the interpreter, the compiler does not: it works on one program while others are traced, on
    `workers` at most (a 32B program takes 2 GB of this machine's memory).
    """
    with uncached(), futures.ThreadPoolExecutor(workers) as pool:
        running = []
        for program in programs:
            traced = [(program.function.trace(**arguments), slots) for arguments, slots in program.reads()]
            running.append(pool.submit(_compile, program, traced))
            running[-1].add_done_callback(lambda _, name=program.name: done(name))
        try:
            return [one.result() for one in running]
        except BaseException:  # one is wrong, or Ctrl-C: the others need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """A block in which JAX's compilation cache rests: what is compiled for devices that are not there it writes, and
    cannot read."""
    name = 'jax_enable_compilation_cache'
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, False)
        compilation_cache.reset_cache()  # JAX looks at the setting when it opens the cache
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _compile(program: Program, traced: list[tuple[jax.stages.Traced, int]]) -> Facts:
    """Of a program whose longest reads come first."""
    longest, *shorter = traced
    found = _compile_one(program, *longest)
    if shorter and not found.refused:
        found = found.along(_compile_one(program, *shorter[0]))
    return found


def _compile_one(program: Program, traced: jax.stages.Traced, slots: int) -> Facts:
    began = time.perf_counter()
    work = flops.count(traced.jaxpr, program.trips) / program.devices
    arguments = _arguments(program)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        used = needed(str(error))
        return Facts(
            program.name,
            program.phase,
            arguments,
            max(used - arguments, 0) + program.copies,
            work,
            0.0,
            {},
            time.perf_counter() - began,
            refused=' '.join(str(error).split())[:400],
            slots=slots,
        )
    memory, of_kernel = compiled.memory_analysis(), flops.by_length(traced.jaxpr, program.trips)
    module = hlo.Module(compiled.as_text(), program.trips)
    sent: collections.Counter[str] = collections.Counter()
    exchanges = 0
    for collective in module.collectives():
        sent[collective.kind] += collective.sent
        exchanges += collective.times if collective.sent else 0
    return Facts(
        program.name,
        program.phase,
        memory.argument_size_in_bytes,
        beside_arguments(memory, program.held) + program.copies,
        work,
        module.bytes_moved(),
        dict(sent),
        time.perf_counter() - began,
        exchanges=exchanges,
        slots=slots,
    ).by_length(of_kernel, program.devices)


def _arguments(program: Program) -> int:
    """Bytes of a program's arguments on one chip, static ones left out."""
    return sum(per_device(tree) for tree in program.arguments.values() if not isinstance(tree, int | bool))


def beside_arguments(memory, held: bool) -> int:
    """Bytes of temporaries, of the program itself, and (unless `held`) of results that take no argument's place.

    What the compiler allocates, where jaxlib tells it: the TPU compiler's `temp_size_in_bytes` is larger than its
    own buffer assignment (12.5 for 8.1 GiB in the update of a 32B policy).
    """
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = getattr(memory, 'total_allocation_bytes', 0)
    temporaries = total - memory.argument_size_in_bytes - results if total else memory.temp_size_in_bytes
    return max(temporaries, 0) + memory.generated_code_size_in_bytes + (0 if held else results)


def needed(text: str) -> int:
    """Bytes that a program of a compiler's out-of-memory message would take; 0 where it names none."""
    match = re.search(r'Used ([\d.]+)([KMG]) of', text)
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


def estimate(
    program: Program, temporaries: int, sent: dict[str, float], exchanges: int = 0, capability: float | None = None
) -> Facts:
    """The same from shapes alone, where no compiler for the chip is at hand.

    Every matmul and every kernel of attention is taken to read its operands and to write its result, and what is
    gathered to be copied; temporaries, exchanged bytes and collectives are the caller's (plan.guess).
    capability: of the GPU, which decides on kernels; None: this machine's.
    """
    longest, *shorter = (
        _estimate(program, arguments, slots, temporaries, sent, exchanges, capability)
        for arguments, slots in program.reads()
    )
    return longest.along(shorter[0]) if shorter else longest


def _estimate(
    program: Program,
    arguments: dict,
    slots: int,
    temporaries: int,
    sent: dict[str, float],
    exchanges: int,
    capability: float | None,
) -> Facts:
    began = time.perf_counter()
    with kernels.traced_anywhere(capability):
        jaxpr = program.function.trace(**arguments).jaxpr
    size = _arguments(program)
    # All arguments are read once at least, but a cache only as far as it is attended to.
    read = size - per_device(arguments['state']) if slots else size
    return Facts(
        program.name,
        program.phase,
        size,
        temporaries + program.copies,
        flops.count(jaxpr, program.trips) / program.devices,
        max(flops.traffic(jaxpr, program.trips) / program.devices, read),
        sent,
        time.perf_counter() - began,
        estimated=True,
        exchanges=exchanges,
        slots=slots,
    ).by_length(flops.by_length(jaxpr, program.trips), program.devices)
