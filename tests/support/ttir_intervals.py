"""Interval analysis of Triton's intermediate form (TTIR): which 32-bit arithmetic that an address needs can overflow.

Each integer has an interval of the values that it can have: arguments and program ids have those of a launch, loaded
integers those of a table, or of their type. An operation in 32 bits whose exact result does not fit marks its result,
and what is computed from it. A mark that reaches an address, the mask of a load or store, or a loop's bound is a
finding.

It reads the printed form, from top to bottom. `kernel_arithmetic.py`, which follows stored values backwards through
loops and memory, reads another form with Triton's MLIR bindings. These lack what is needed here: constants of tensors,
and operations as text, which a finding quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Interval(NamedTuple):
    low: int
    high: int
    origin: str = ""  # the operation that can overflow; empty: none


@dataclass
class Operation:
    text: str  # without its regions
    regions: list[list[Operation]] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)  # of each region's block

    @property
    def results(self) -> list[str]:
        """The names of its results: %5, or %5#0 and %5#1."""
        match = re.match(r"(%[\w-]+)(?::(\d+))? = ", self.text)
        if match is None:
            return []
        name, number = match.groups()
        return [name] if number is None else [f"{name}#{index}" for index in range(int(number))]

    @property
    def name(self) -> str:
        match = re.match(r'(?:%[\w:-]+ = )?"?([\w.]+)', self.text)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w#-]+", self.text.partition(" = ")[2] or self.text)

    @property
    def type(self) -> str:
        """The element type of its result: i32, i64, f32, ptr .."""
        if self.name in ("arith.cmpi", "arith.cmpf"):  # printed as that of the operands
            return "i1"
        if self.name == "tt.load":  # whose type is printed as that of the pointer
            return str(re.findall(r"ptr<(\w+)>", self.text)[-1])
        return element_type(re.split(r" : | -> | to ", self.text)[-1])


def element_type(text: str) -> str:
    if "ptr<" in text:
        return "ptr"
    found = re.findall(r"(?:^|[<x( ])(i\d+|f\d+|bf16|index)\b", text)
    return found[-1] if found else ""


def parse(text: str) -> list[Operation]:
    """Return the operations of the function in a module, as printed without locations."""
    lines = iter(text.splitlines())
    for line in lines:
        if "tt.func" in line:
            return _region(lines)[0]
    raise ValueError("no function")


def _region(lines: Iterator[str]) -> tuple[list[Operation], list[str], str]:
    """Return the operations of a region, its block's arguments, and the line that ends it."""
    operations: list[Operation] = []
    arguments: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith("}"):
            return operations, arguments, line
        if line.startswith("^"):
            arguments = re.findall(r"(%\w+):", line)
            continue
        operation = Operation(line)
        end = line
        while end.endswith("{"):
            body, of_block, end = _region(lines)
            operation.regions.append(body)
            operation.arguments.append(of_block)
        if operation.regions and ":" in end:
            operation.text += end
        operations.append(operation)
    return operations, arguments, ""


def of_type(name: str) -> Interval:
    bits = int(name[1:]) if re.fullmatch(r"i\d+", name) else 64
    return Interval(0, 1) if bits == 1 else Interval(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _corners(function: Callable[[int, int], int]) -> Callable[[Interval, Interval], tuple[int, int]]:
    def compute(a: Interval, b: Interval) -> tuple[int, int]:
        values = [function(x, y) for x in a[:2] for y in b[:2]]
        return min(values), max(values)

    return compute


def _divided(a: Interval, b: Interval) -> tuple[int, int]:
    if b.low <= 0:
        largest = max(abs(a.low), abs(a.high))
        return -largest, largest
    return _corners(lambda x, y: abs(x) // y * (1 if x >= 0 else -1))(a, b)


def _remainder(a: Interval, b: Interval) -> tuple[int, int]:
    most = max(abs(a.low), abs(a.high))
    most = min(most, b.high - 1) if b.low > 0 else most
    return (0 if a.low >= 0 else -most), most


# What others compute may be any number.
ARITHMETIC: Mapping[str, Callable[[Interval, Interval], tuple[int, int]]] = {
    "arith.addi": _corners(lambda x, y: x + y),
    "arith.subi": _corners(lambda x, y: x - y),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.shli": _corners(lambda x, y: x << max(0, min(y, 63))),
    "arith.minsi": _corners(min),
    "arith.divsi": _divided,
    "arith.remsi": _remainder,
}
SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui", "tt.cat"}
SAME |= {"arith.index_cast", "tt.join", "tt.split", "tt.unsplat"}
ACCESSES = {"tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas"}


class Analysis:
    """Walks through a kernel once, with an interval for each integer."""

    def __init__(
        self,
        arguments: Mapping[str, tuple[str, Interval]],  # element type and values, by their names %arg0, ..
        grid: tuple[int, ...],
        loaded: Mapping[str, Interval],  # of the integers that a pointer argument points to
    ) -> None:
        self.kinds = {name: kind for name, (kind, _) in arguments.items()}  # element type of each value
        self.values = {name: interval for name, (kind, interval) in arguments.items() if kind.startswith("i")}
        self.grid = (*grid, 1, 1)[:3]
        self.loaded = loaded
        self.roots: dict[str, str] = {}  # pointer -> the argument that it is derived from
        self.findings: dict[str, None] = {}  # a set in order

    def run(self, operations: list[Operation]) -> None:
        for operation in operations:
            match operation.name:
                case "scf.for":
                    self._for(operation)
                case "scf.if":
                    self._if(operation)
                case "scf.while":
                    self._while(operation)
                case "tt.reduce" | "tt.scan":
                    self._reduce(operation)
                case _:
                    self._simple(operation)

    def _simple(self, operation: Operation) -> None:
        operands = operation.operands
        if operation.name == "tt.addptr" or operation.name in ACCESSES:  # offsets, and masks
            for operand in operands:
                if operation.name == "tt.addptr" or self.kinds[operand] == "i1":
                    self._check(operation, operand)
        for result in operation.results:
            self.kinds[result] = operation.type
            self.values.pop(result, None)  # of a region before, which had the same name
            if operation.type == "ptr":
                self.roots[result] = next((self._root(some) for some in operands if self.kinds[some] == "ptr"), "")
            elif operation.type.startswith("i"):
                self.values[result] = self._value(operation)

    def _root(self, pointer: str) -> str:
        return self.roots.get(pointer, pointer)

    def _value(self, operation: Operation) -> Interval:
        name, kind = operation.name, operation.type
        found = [self.values[some] for some in operation.operands if some in self.values]
        origin = next((some.origin for some in found if some.origin), "")
        if name == "arith.constant":
            return _constant(operation.text)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            size = self.grid["xyz".index(operation.text.split()[3])]
            return Interval(0, size - 1) if name == "tt.get_program_id" else Interval(size, size)
        if name == "tt.make_range":
            bounds = dict(re.findall(r"(start|end) = (\d+)", operation.text))
            return Interval(int(bounds["start"]), int(bounds["end"]) - 1)
        if name == "tt.load":
            return self.loaded.get(self._root(operation.operands[0]), of_type(kind))
        if name in SAME or name == "arith.select":
            return joined(found[-2:] if name == "arith.select" else found)
        if name == "arith.trunci":
            return _fitted(found[0], kind, operation.text)
        if name in ARITHMETIC:
            return _fitted(Interval(*ARITHMETIC[name](*found), origin), kind, operation.text)
        return of_type(kind)._replace(origin=origin)

    def _check(self, operation: Operation, operand: str) -> None:
        if origin := self.values.get(operand, Interval(0, 0)).origin:
            self.findings[f"{origin}  ->  {operation.text}"] = None

    def _alias(self, name: str, others: Sequence[str]) -> None:
        """Give a value what others have that it may be."""
        values = [self.values[other] for other in others if other in self.values]
        self.kinds[name], self.roots[name] = self.kinds[others[0]], self._root(others[0])
        self.values.pop(name, None)
        if values:
            self.values[name] = joined(values)

    def _for(self, operation: Operation) -> None:
        head = re.search(r"scf\.for (?:unsigned )?(%\w+) = (%[\w#-]+) to (%[\w#-]+) step (%[\w#-]+)", operation.text)
        assert head is not None, operation.text
        variable, *names = head.groups()
        first, last, step = (self.values[name] for name in names)
        for name in names:
            self._check(operation, name)
        self.kinds[variable] = self.kinds[names[0]]
        beyond = Interval(first.low, max(first.low, last.high - 1) + step.high)  # what ends the loop
        if _fitted(beyond, self.kinds[variable], "x").origin:
            self.findings[f"the loop's variable  ->  {operation.text}"] = None
        self.values[variable] = Interval(first.low, max(first.low, last.high - 1))
        num_trips = max(0, -(-(last.high - first.low) // max(1, step.low)))
        (body,) = operation.regions
        iterated = re.findall(r"(%\w+) = (%[\w#-]+)", operation.text.partition("iter_args(")[2])
        ends = body[-1].operands if iterated else []
        self._learn_iterated(body, iterated, ends, num_trips)
        self.run(body)
        for result, (_, begin), end in zip(operation.results, iterated, ends, strict=True):
            self._alias(result, [begin, end])

    def _learn_iterated(
        self, body: list[Operation], iterated: list[tuple[str, str]], ends: list[str], num_trips: int
    ) -> None:
        """Bound the values that a loop hands on: each trip adds what an addition in its body adds, or they are any."""
        findings = dict(self.findings)
        self._begin_with_any(iterated)
        self.run(body)
        sums = {result: some for some in body if some.name == "arith.addi" for result in some.results}
        for (name, begin), end in zip(iterated, ends, strict=True):
            if begin in self.values:
                start = self.values[begin]
                if end in sums and name in sums[end].operands:
                    (added,) = [self.values[some] for some in sums[end].operands if some != name]
                    trips, origin = max(0, num_trips - 1), start.origin or added.origin
                    low, high = start.low + trips * min(0, added.low), start.high + trips * max(0, added.high)
                    self.values[name] = _fitted(Interval(low, high, origin), self.kinds[name], sums[end].text)
                else:
                    any_value = of_type(self.kinds[name])._replace(origin=start.origin)
                    self.values[name] = start if end == name else any_value
        self.findings = findings

    def _begin_with_any(self, begun: list[tuple[str, str]]) -> None:
        """Let the values that a loop hands on be any of their type."""
        for name, begin in begun:
            self._alias(name, [begin])
            if name in self.values:
                self.values[name] = of_type(self.kinds[name])._replace(origin=self.values[name].origin)

    def _if(self, operation: Operation) -> None:
        for region in operation.regions:
            self.run(region)
        if operation.results:
            ends = [region[-1].operands for region in operation.regions]
            for result, *some in zip(operation.results, *ends, strict=True):
                self._alias(result, some)

    def _while(self, operation: Operation) -> None:
        """What it hands on may be any."""
        begun = re.findall(r"(%\w+) = (%[\w#-]+)", operation.text)
        self._begin_with_any(begun)
        before, after = operation.regions
        self.run(before)
        ends = before[-1].operands[1:]  # after the condition
        for result, end in zip(operation.results, ends, strict=True):
            self._alias(result, [end])
        for name, result in zip(operation.arguments[1], operation.results, strict=True):
            self._alias(name, [result])
        self.run(after)

    def _reduce(self, operation: Operation) -> None:
        """Bound the sum of a tensor by its size; minima and maxima, and an index of these, are among the operands."""
        sizes = [int(size) for size in re.findall(r"(\d+)x", operation.text.rpartition(" : (")[2])]
        is_sum = any(some.name == "arith.addi" for some in operation.regions[0])
        for result, operand in zip(operation.results, operation.operands, strict=False):
            self._alias(result, [operand])
            if is_sum and operand in self.values:
                some = self.values[operand]
                total = Interval(min(0, some.low) * max(sizes), max(0, some.high) * max(sizes), some.origin)
                self.values[result] = _fitted(total, self.kinds[operand], operation.text)


def joined(intervals: Sequence[Interval]) -> Interval:
    origin = next((some.origin for some in intervals if some.origin), "")
    return Interval(min(some.low for some in intervals), max(some.high for some in intervals), origin)


def _constant(text: str) -> Interval:
    value = re.search(r"constant (?:dense<)?(-?\d+|true|false)", text)
    assert value is not None, text
    number = {"true": 1, "false": 0}[value[1]] if value[1].isalpha() else int(value[1])
    return Interval(number, number)


def _fitted(value: Interval, kind: str, text: str) -> Interval:
    """Return a value that fits its type, or any value of the type. Below 64 bits, that has its origin here."""
    any_value = of_type(kind)
    if any_value.low <= value.low and value.high <= any_value.high:
        return value
    return any_value._replace(origin=value.origin or (text if kind != "i64" else ""))
