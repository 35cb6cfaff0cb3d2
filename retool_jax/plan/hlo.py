"""Reads a compiled program's text: bytes that its loops move through memory and between chips.

`cost_analysis` counts the body of a loop once; here each computation counts as often as it runs.
The text is that of `jax.stages.Compiled.as_text()`, after partitioning: every shape is one chip's.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
         'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16}  # fmt: skip
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# Instructions that only name, regroup or wait for bytes that another one moves.
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
        'partition-id', 'replica-id', 'iota', 'optimization-barrier', 'opt-barrier', 'domain', 'add-dependency',
}  # fmt: skip
SLICES = {'slice', 'dynamic-slice', 'gather'}  # read only as much of a large operand as they return
RENAMES = ('bitcast', 'reshape')  # of what is in a fusion
UPDATES = {'dynamic-update-slice': 1, 'scatter': -1}  # write in place; the index of the operand that is written

_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^{}]*\})?')
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool

    def called(self) -> Iterator[str]:
        """Computations that it runs once per execution (not a loop's body)."""
        for key in ('calls', 'to_apply', 'async_execution_thread', 'true_computation', 'false_computation'):
            yield from re.findall(rf'\b{key}=%?([\w.\-]+)', self.rest)
        for group in re.findall(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}', self.rest):
            yield from re.findall(r'%?([\w.\-]+)', group)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective with all its repetitions. Bytes are one chip's."""

    kind: str
    bytes: int  # of the larger side: the gathered, or the unreduced array
    group: int  # chips that take part
    times: int

    @property
    def sent(self) -> float:
        """Bytes that leave a chip in a ring, all repetitions together."""
        n = self.group
        share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * (share if n > 1 else 0.0)


class Module:
    """A program's computations, and how often each runs."""

    def __init__(self, text: str, trips: int = 1):
        """trips: iterations of loops whose number the program does not say.

        Raises:
          ValueError: the text holds no program.
        """
        self.unknown, self.entry = trips, ''
        self.computations: dict[str, dict[str, Instruction]] = {}
        current = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[1], {})
                self.entry = head[1] if line.startswith('ENTRY') else self.entry
            elif current is not None and (match := _LINE.match(line)):
                instruction = _parse(match)
                if instruction is not None:
                    current[instruction.name] = instruction
        if not self.entry:
            raise ValueError('the text holds no ENTRY computation')

    def runs(self) -> Iterator[tuple[str, int]]:
        """(computation, times it runs) of the entry and of every loop body and branch below it."""
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            yield name, times
            for i in self.computations[name].values():
                if i.kind == 'while':
                    body = re.search(r'body=%?([\w.\-]+)', i.rest)[1]
                    pending.append((body, times * self.trip_count(i)))
                elif i.kind in ('conditional', 'call') or _runs_apart(i):
                    pending += [(c, times) for c in i.called() if c in self.computations]

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a while loop: what the compiler wrote down, or its counter's limit."""
        if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]]
        root = next(i for i in condition.values() if i.root)
        if root.kind == 'fusion':
            condition = condition | self.computations[next(root.called())]
            root = next(i for i in self.computations[next(root.called())].values() if i.root)
        if root.kind == 'compare' and 'direction=LT' in root.rest:
            for operand in root.operands:
                limit = condition.get(operand)
                if limit is not None and limit.kind == 'constant' and (n := re.match(r'(\d+)', limit.rest)):
                    return int(n[1])
        return self.unknown

    def collectives(self) -> list[Collective]:
        """Every collective, its repetitions counted; a step of an asynchronous one counts once."""
        collectives = []
        for name, times in self.runs():
            seen = set()
            for inner, i in self._below(name):
                kind = next((k for k in KINDS if i.kind in (k, f'{k}-start')), None)
                channel = re.search(r'channel_id=(\d+)', i.rest)
                mark = (kind, channel[1] if channel else i.name)
                if kind is None or mark in seen:
                    continue  # fused start, body and end of one exchange share its channel
                seen.add(mark)
                scope = self.computations[inner]
                sides = [array_bytes(i.shape, whole=False)]
                sides += [array_bytes(scope[o].shape) for o in i.operands if o in scope]
                if kind == 'all-reduce' and inner.startswith('all-reduce-scatter'):
                    kind = 'reduce-scatter'
                collectives.append(Collective(kind, int(max(sides)), group_size(i.rest), times))
        return collectives

    def _below(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """Instructions of a computation and of the fusions in it."""
        for i in self.computations[name].values():
            yield name, i
            if i.kind == 'fusion' or i.kind.startswith('async'):
                for called in i.called():
                    if called in self.computations:
                        yield from self._below(called)

    def bytes_moved(self) -> float:
        """Bytes read from and written to a chip's main memory, whole loops counted.

        An instruction counts with its operands and its result, a slice with what it returns, an update in
        place with what it writes, a fusion with what is inside it; what stays on chip does not count.
        """
        total = 0.0
        for name, times in self.runs():
            scope = self.computations[name]
            total += times * sum(self._moved(i, scope) for i in scope.values())
        return total

    def _moved(self, i: Instruction, scope: dict[str, Instruction]) -> float:
        if i.kind in FREE or i.kind.endswith(('-done', '-update')) or _runs_apart(i):
            return 0.0
        if i.kind == 'fusion':
            called = next(i.called())
            sizes = [memory_bytes(scope[o].shape) for o in i.operands if o in scope]
            read = sum(min(size, self._reads(called, n, size)) for n, size in enumerate(sizes))
            return read + self._writes(called, i.shape)
        result = memory_bytes(i.shape)
        if i.kind in SLICES:
            return 2 * result
        if i.kind in UPDATES:
            update = i.operands[UPDATES[i.kind]]
            return 2 * (memory_bytes(scope[update].shape) if update in scope else 0.0)
        operands = [scope[o].shape for o in i.operands if o in scope]
        read = sum(map(memory_bytes, operands))
        if i.kind.endswith('-start') and i.shape.startswith('('):  # its result repeats its operands
            if i.kind.removesuffix('-start') in SLICES:
                return array_bytes(i.shape) - sum(map(array_bytes, operands)) + result - read
            return result
        return result + read

    def _reads(self, name: str, number: int, whole: float) -> float:
        """Bytes that a fusion, and those inside it, read of a parameter: what it slices of it, nothing where it only
        updates it, else the `whole`."""
        users, parameters = self._uses(name)
        read = 0.0
        for user, via in self._ends(parameters[number], users) if number in parameters else ():
            if user is not None and user.kind in SLICES and user.operands[0] == via:
                read += array_bytes(user.shape)
            elif user is not None and user.kind == 'fusion':
                read += sum(self._reads(next(user.called()), n, whole) for n, o in enumerate(user.operands) if o == via)
            elif user is None or user.kind not in UPDATES or user.operands[0] != via:
                return whole
        return read

    def _ends(self, i: Instruction, users) -> Iterator[tuple[Instruction | None, str]]:
        """Who uses a value, seen through what only renames it: (user, the name it uses); None where it is returned."""
        if i.root:
            yield None, i.name
        for user in users[i.name]:
            if self._renames(user):
                yield from self._ends(user, users)
            else:
                yield user, i.name

    def _renames(self, i: Instruction) -> bool:
        """Whether it gives its operand another shape, and nothing else; a fusion may hold nothing but such."""
        if i.kind != 'fusion':
            return i.kind in RENAMES
        inside = self.computations.get(next(i.called()), {}).values()
        return len(i.operands) == 1 and all(i.kind in ('parameter', *RENAMES) for i in inside)

    def _writes(self, name: str, shape: str) -> float:
        """Bytes that a fusion writes of a result of this shape: of what it updates in place no more than the update."""
        scope = self.computations.get(name, {})
        root = next((i for i in scope.values() if i.root), None)
        arrays = [match[0] for match in _ARRAY.finditer(shape)]
        if root is not None and root.kind == 'tuple' and len(root.operands) == len(arrays):
            return sum(self._written(scope, scope.get(o), array) for o, array in zip(root.operands, arrays))
        return self._written(scope, root, shape)

    def _written(self, scope: dict[str, Instruction], result: Instruction | None, shape: str) -> float:
        """The same of one array, which is or comes out of `result`."""
        while result is not None and result.operands and (result.kind in ('copy', 'convert') or self._renames(result)):
            result = scope.get(result.operands[0])
        if result is not None and result.kind == 'fusion':
            return self._writes(next(result.called()), shape)
        if result is not None and result.kind in UPDATES and result.operands[UPDATES[result.kind]] in scope:
            return min(array_bytes(scope[result.operands[UPDATES[result.kind]]].shape), memory_bytes(shape))
        return memory_bytes(shape)

    @functools.cache  # noqa: B019 — a module is short-lived
    def _uses(self, name: str) -> tuple[dict[str, list[Instruction]], dict[int, Instruction]]:
        """Of a computation: who uses each value, and its parameters by their numbers."""
        scope = self.computations.get(name, {})
        users = collections.defaultdict(list)
        for i in scope.values():
            for operand in i.operands:
                users[operand].append(i)
        return users, {int(re.match(r'(\d+)', i.rest)[1]): i for i in scope.values() if i.kind == 'parameter'}


def _runs_apart(i: Instruction) -> bool:
    """Whether it starts a computation, whose instructions count for themselves."""
    return i.kind.endswith('-start') and 'calls=' in i.rest


def _parse(match: re.Match) -> Instruction | None:
    text = match[3]
    if text.startswith('('):
        end = _closing(text[1:]) + 2
        shape, text = text[:end], text[end:].lstrip()
    else:
        shape, _, text = text.partition(' ')
    kind, paren, text = text.partition('(')
    if not paren:
        return None
    end = _closing(text)
    inside, rest = text[:end], text[end + 1 :]
    operands = tuple(re.findall(r'%([\w.\-]+)', inside))
    if kind in ('parameter', 'constant'):
        operands, rest = (), inside + rest
    return Instruction(match[2], shape, kind, operands, rest, bool(match[1]))


def _closing(text: str) -> int:
    """Where the parenthesis that was open before `text` closes."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == '(') - (char == ')')
        if depth < 0:
            return i
    return len(text)


def array_bytes(shape: str, whole: bool = True) -> float:
    """Bytes of a shape as HLO writes it; of a tuple all parts, or (whole=False) the largest."""
    sizes = [
        BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(',') if n) for kind, dims, _ in _ARRAY.findall(shape)
    ]
    return (sum(sizes) if whole else max(sizes)) if sizes else 0.0


def memory_bytes(shape: str) -> float:
    """The same, without what a layout places outside the main memory: S(n) in its braces."""
    return sum(array_bytes(f'{kind}[{dims}]') for kind, dims, layout in _ARRAY.findall(shape) if 'S(' not in layout)


def group_size(rest: str) -> int:
    """Chips of one replica group, in any of the three ways that HLO writes them."""
    if named := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
        return len(listed[1].split(','))
    if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]', rest):
        return int(iota[2])
    return 2 if 'source_target_pairs' in rest else 1
