"""How a compiled Triton kernel computes what it stores: expressions, without addresses, masks, layouts and schedules.

They are read from TTGIR, Triton's last intermediate form that still has loops and products of tiles. Two kernels with
equal expressions do the same operations on the same numbers in the same order, however large their tiles are, so they
store the same bits. Products count as equal if they use the same instruction, but for its size in rows and columns, as
often in a step. Sums within a tile (tt.reduce) are equal only in equal layouts, which determine their order.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import networkx as nx

# They only move numbers.
TRANSPARENT = {"ttg.convert_layout", "tt.broadcast", "tt.expand_dims", "tt.splat", "tt.reshape", "tt.trans"}
TRANSPARENT |= {"ttg.memdesc_trans", "ttg.memdesc_index", "ttg.memdesc_subslice", "ttg.local_load", "tt.unsplat"}
TRANSPARENT |= {"ttng.warp_group_dot_wait", "ttng.tmem_subslice"}
COMMUTATIVE = {"arith.addf", "arith.mulf", "arith.maxnumf", "arith.minnumf", "arith.maximumf", "arith.minimumf"}
SUMS = "sums in tensor memory"
# What writes to shared or tensor memory: which of its buffers.
WRITES = {"ttg.local_store": 0, "ttg.async_copy_global_to_local": 0, "ttng.tmem_store": 0, "ttng.tc_gen5_mma": 2}
ALLOCATIONS = ("ttg.local_alloc", "ttng.tmem_alloc")
NUMBERS = re.compile(r"(f|bf|i8|i16)")  # element types of numbers; other integers are indices and masks
INSTRUCTION_BYTES = 32  # of the inputs of one row that an instruction of a tensor core multiplies


class Expression(msgspec.Struct, frozen=True):
    """An operation and the keys of its operands."""

    operation: str
    operands: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


class Arithmetic(msgspec.Struct, frozen=True):
    expressions: dict[str, Expression]  # by key
    stores: list[tuple[str, str]]  # the pointer's name and the key of what is stored, in order

    def stored(self, pointer: str) -> list[str]:
        """Return the keys of what is stored through a pointer."""
        return [key for name, key in self.stores if name == pointer]

    def below(self, key: str) -> set[str]:
        """Return the keys of an expression and of all that it is made of."""
        graph = nx.DiGraph({name: expression.operands for name, expression in self.expressions.items()})
        return {key, *nx.descendants(graph, key)}

    def describe(self, key: str) -> list[str]:
        """Return an expression line by line, operands first."""
        numbers: dict[str, int] = {}
        lines: list[str] = []

        def visit(key: str) -> str:
            if key not in numbers:
                expression = self.expressions[key]
                operands = [visit(operand) for operand in expression.operands]
                numbers[key] = len(lines)
                lines.append(f"%{len(lines)} = {expression.operation}({', '.join(operands)})")
            return f"%{numbers[key]}"

        visit(key)
        return lines

    def replace(self, key: str, replacements: Mapping[str, str], other: Arithmetic) -> tuple[str, Arithmetic]:
        """Return an expression in which expressions have been replaced by those of another kernel, by their keys."""
        expressions = dict(other.expressions)

        def visit(key: str) -> str:
            if key in replacements:
                return replacements[key]
            expression = self.expressions[key]
            new = _ordered(expression.operation, [visit(operand) for operand in expression.operands])
            expressions[new.key] = new
            return new.key

        new_key = visit(key)
        return new_key, Arithmetic(expressions, [])


def load_key(pointer: str) -> str:
    """Return the key of a load through a pointer."""
    return Expression(f"load {pointer}").key


def _ordered(operation: str, operands: Sequence[str]) -> Expression:
    return Expression(operation, tuple(sorted(operands) if operation in COMMUTATIVE else operands))


def _element(type_name: str) -> str:
    """Return the element type of a tensor, a buffer or a scalar."""
    found = re.match(r"(?:tensor|!ttg\.memdesc)<(?:\d+x)*([^,>]+)", type_name)
    return found[1] if found else type_name


def _num_instructions(a: Any) -> int:
    """Return how many instructions a product of tiles takes along its inputs, by the type of the first tile."""
    type_name = str(a.get_type())
    size = {"f32": 4, "f16": 2, "bf16": 2}[_element(type_name)]
    (columns,) = re.findall(r"<(?:\d+x)*(\d+)x[a-z]", type_name)
    return int(columns) * size // INSTRUCTION_BYTES


def _operands(operation: Any) -> list[Any]:
    return [operation.get_operand(index) for index in range(operation.get_num_operands())]


class KernelReader:
    """Reads the expressions of one kernel from its TTGIR."""

    def __init__(self, ttgir: str) -> None:
        from triton._C.libtriton import ir, nvidia

        self.context = ir.context()
        ir.load_dialects(self.context)
        nvidia.load_dialects(self.context)
        with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
            file.write(ttgir)
            file.flush()
            self.module = ir.parse_mlir_module(file.name, self.context)
        self.operations: list[Any] = []
        self.module.walk(self.operations.append)
        self.expressions: dict[str, Expression] = {}
        self.known: dict[tuple[int, tuple[int, ...]], str] = {}
        self.definitions: dict[int, tuple[Any, int]] = {}
        self.writes: dict[int, list[Any]] = defaultdict(list)  # by the buffer
        self.yields: dict[int, list[Any]] = defaultdict(list)  # by the region that they end
        self.inner: dict[int, list[str]] = defaultdict(list)  # names of operations, by their region
        self.outer: dict[int, Any] = {}  # the operation that a region belongs to
        self.carried: dict[int, tuple[Any, int]] = {}  # values carried by loops: the loop, and which they are
        self.constants: dict[int, str] = {}
        self.arguments: dict[int, str] = {}
        self.readers: dict[str, Callable[[Any, int, tuple[int, ...]], str]] = {
            "scf.for": self._loop_key,
            "scf.if": self._condition_key,
            "arith.constant": self._constant_key,
            "arith.select": self._select_key,
            "tt.load": self._load_key,
            "tt.reduce": self._reduce_key,
            "tt.dot": self._product_key,
            "ttng.warp_group_dot": self._product_key,
            **dict.fromkeys(ALLOCATIONS, self._memory_key),
            "ttng.tmem_load": self._accumulated_key,
        }
        self._index(ttgir)

    def arithmetic(self) -> Arithmetic:
        """Return what the kernel stores. Numbers of a type that is none of `NUMBERS` are left out."""
        stores = []
        for operation in self.operations:
            if operation.get_name() == "tt.store":
                pointer, value = operation.get_operand(0), operation.get_operand(1)
                if NUMBERS.match(_element(str(value.get_type()))):
                    stores.append((self._pointer(pointer), self._key(value, ())))
        return Arithmetic(self.expressions, list(dict.fromkeys(stores)))

    def _index(self, ttgir: str) -> None:
        texts = iter(re.findall(r"arith\.constant (?:dense<)?([^>:\s]+)", ttgir))
        names = re.findall(r"%(\w+): [^%]*?\bloc\(", re.findall(r"tt\.func public @\w+\((.*)", ttgir)[0])
        for operation in self.operations:
            name = operation.get_name()
            for index in range(operation.get_num_results()):
                self.definitions[operation.get_result(index).id()] = operation, index
            region = operation.get_block().get_parent().id() if operation.get_block() is not None else 0
            self.inner[region].append(name)
            for index in range(operation.get_num_regions()):
                self.outer[operation.get_region(index).id()] = operation
            if name == "arith.constant":
                self.constants[operation.get_result(0).id()] = next(texts)
            elif name == "scf.yield":
                self.yields[region].append(operation)
            elif name == "scf.for":
                for index in range(operation.get_num_results()):
                    self.carried[self._body_argument(operation, index).id()] = operation, index
            elif name == "tt.return":
                block = operation.get_block()
                self.arguments = {block.get_argument(index).id(): names[index] for index in range(len(names))}
        for operation in self.operations:
            name = operation.get_name()
            if name in WRITES:
                buffers = [value for value in _operands(operation) if "memdesc" in str(value.get_type())]
                self.writes[self._buffer(buffers[WRITES[name]])].append(operation)

    def _add(self, operation: str, operands: Iterable[str] = ()) -> str:
        expression = _ordered(operation, list(operands))
        self.expressions[expression.key] = expression
        return expression.key

    def _before(self, value: Any) -> Any:
        """Return what a pointer or a view of memory is made from."""
        if value.id() in self.carried:
            loop, index = self.carried[value.id()]
            return loop.get_operand(index + 3)
        return self.definitions[value.id()][0].get_operand(0)

    def _pointer(self, value: Any) -> str:
        """Return the name of the kernel's argument that a pointer comes from."""
        while value.id() not in self.arguments:
            value = self._before(value)
        return self.arguments[value.id()]

    def _buffer(self, value: Any) -> int:
        """Return the id of the allocation that a view of shared or tensor memory belongs to."""
        while value.id() in self.carried or self.definitions[value.id()][0].get_name() not in ALLOCATIONS:
            value = self._before(value)
        return int(value.id())

    def _key(self, value: Any, stack: tuple[int, ...]) -> str:
        """Return the key of a value's expression. `stack` has the carried values in whose expression it occurs."""
        known = value.id(), stack
        if known not in self.known:
            self.known[known] = self._new_key(value, stack)
        return self.known[known]

    def _new_key(self, value: Any, stack: tuple[int, ...]) -> str:
        if value.id() in self.carried:
            return self._carried_key(value, stack)
        if value.id() in self.arguments:
            return self._add(f"argument {self.arguments[value.id()]}")
        operation, index = self.definitions[value.id()]
        name, element = operation.get_name(), _element(str(value.get_type()))
        if not NUMBERS.match(element) and name != "arith.cmpf":
            return self._add("index")
        if name in TRANSPARENT:
            return self._key(operation.get_operand(index if name == "ttng.warp_group_dot_wait" else 0), stack)
        if name in self.readers:
            return self.readers[name](operation, index, stack)
        return self._add(f"{name} {element}", [self._key(operand, stack) for operand in _operands(operation)])

    def _loop_key(self, loop: Any, index: int, stack: tuple[int, ...]) -> str:
        return self._carried_key(self._body_argument(loop, index), stack)

    def _condition_key(self, condition: Any, index: int, stack: tuple[int, ...]) -> str:
        regions = [condition.get_region(number).id() for number in range(condition.get_num_regions())]
        return self._add("if", [self._key(self.yields[region][0].get_operand(index), stack) for region in regions])

    def _constant_key(self, constant: Any, index: int, stack: tuple[int, ...]) -> str:
        value = constant.get_result(0)
        return self._add(f"{self.constants[value.id()]} {_element(str(value.get_type()))}")

    def _load_key(self, load: Any, index: int, stack: tuple[int, ...]) -> str:
        return self._add(f"load {self._pointer(load.get_operand(0))}")

    def _reduce_key(self, reduce: Any, index: int, stack: tuple[int, ...]) -> str:
        combined = " ".join(self.inner[reduce.get_region(0).id()])
        layout = reduce.get_operand(0).get_type()
        name = f"reduce {combined} axis {reduce.get_int_attr('axis')} {layout} {index}"
        return self._add(name, [self._key(operand, stack) for operand in _operands(reduce)])

    def _select_key(self, select: Any, index: int, stack: tuple[int, ...]) -> str:
        """Return the key of a selection, or of what is loaded if it only stands for the mask of a load."""
        condition, chosen, other = (self._key(operand, stack) for operand in _operands(select))
        is_load = self.expressions[chosen].operation.startswith("load ")
        if is_load and self.expressions[condition].operation == "index" and not self.expressions[other].operands:
            return chosen
        return self._add("select", [condition, chosen, other])

    def _body_argument(self, loop: Any, index: int) -> Any:
        return self.yields[loop.get_region(0).id()][0].get_block().get_argument(index + 1)

    def _carried_key(self, value: Any, stack: tuple[int, ...]) -> str:
        """Return the key of a value that a loop carries: one that is only loaded ahead is what is loaded."""
        if value.id() in stack:
            return self._add(f"carried {len(stack) - 1 - stack.index(value.id())}")
        loop, index = self.carried[value.id()]
        start, end = loop.get_operand(index + 3), self.yields[loop.get_region(0).id()][0].get_operand(index)
        if not self._depends(end, value.id()):
            return self._one_of([self._key(start, stack), self._key(end, stack)])
        step = self.constants.get(loop.get_operand(2).id(), "?")
        return self._add(f"loop by {step}", [self._key(start, stack), self._key(end, (*stack, value.id()))])

    def _depends(self, value: Any, on: int) -> bool:
        """Return whether a value is computed from a carried value of an earlier turn of its loop."""
        found: set[int] = set()
        left = [value]
        while left:
            if (value := left.pop()).id() not in found:
                found.add(value.id())
                left += self._inputs(value)
        return on in found

    def _inputs(self, value: Any) -> list[Any]:
        """Return what a value is computed from; for one that a loop carries, also in an earlier turn."""
        if value.id() in self.carried:
            loop, index = self.carried[value.id()]
            return [loop.get_operand(index + 3), self.yields[loop.get_region(0).id()][0].get_operand(index)]
        if value.id() not in self.definitions:
            return []
        operation, index = self.definitions[value.id()]
        if operation.get_name() == "scf.for":
            return [self._body_argument(operation, index)]
        regions = [operation.get_region(number).id() for number in range(operation.get_num_regions())]
        ends = [end for region in regions for end in self.yields[region] if index < end.get_num_operands()]
        return _operands(operation) + [end.get_operand(index) for end in ends]

    def _one_of(self, keys: Iterable[str]) -> str:
        different = sorted(set(keys))
        return different[0] if len(different) == 1 else self._add("one of", different)

    def _memory_key(self, allocation: Any, index: int, stack: tuple[int, ...]) -> str:
        """Return the key of what shared memory holds, or tensor memory that is the first factor of a product."""
        if allocation.get_num_operands():
            return self._key(allocation.get_operand(0), stack)
        writes = self.writes[allocation.get_result(0).id()]
        return self._one_of([self._written_key(write, stack) for write in writes])

    def _written_key(self, write: Any, stack: tuple[int, ...]) -> str:
        if write.get_name() == "ttg.async_copy_global_to_local":
            return self._load_key(write, 0, stack)
        (numbers,) = (value for value in _operands(write) if str(value.get_type()).startswith("tensor"))
        return self._key(numbers, stack)

    def _product_key(self, product: Any, index: int, stack: tuple[int, ...]) -> str:
        """Return the key of a product that is added to the last operand. Successive parts of one step are joined."""
        version = re.findall(r"versionMajor = (\d)", str(product.get_result(0).get_type()))
        a = product.get_operand(0)
        name = f"product {'mma ' + version[0] if version else 'fma'} {_element(str(a.get_type()))}"
        a_key, b_key, sums_key = (self._key(operand, stack) for operand in _operands(product)[:3])
        times = _num_instructions(a)
        before = self.expressions[sums_key]
        prefix, _, previous = before.operation.rpartition(" x")
        if prefix == name and before.operands[:2] == (a_key, b_key):
            times, sums_key = times + int(previous), before.operands[2]
        return self._add(f"{name} x{times}", [a_key, b_key, sums_key])

    def _accumulated_key(self, load: Any, index: int, stack: tuple[int, ...]) -> str:
        """Return the key of sums in tensor memory: all that is written there, in order."""
        buffer = self._buffer(load.get_operand(0))
        if buffer in stack:  # what is written was computed from what was there
            return self._add(f"carried {len(stack) - 1 - stack.index(buffer)}")
        writes, stack = self.writes[buffer], (*stack, buffer)
        keys = []
        for write in writes:
            where = "".join(self._inside(write)[len(self._inside(load)) :])
            if write.get_name() == "ttng.tmem_store":
                keys.append(self._add(f"set{where}", [self._written_key(write, stack)]))
                continue
            a, b = write.get_operand(0), write.get_operand(1)
            adds = next(value for value in _operands(write) if str(value.get_type()) == "i1")
            start = self.constants.get(adds.id(), "?")
            name = f"tcgen05 {_element(str(a.get_type()))} x{_num_instructions(a)} adds {start}{where}"
            keys.append(self._add(name, [self._key(a, stack), self._key(b, stack)]))
        return self._add(SUMS, keys)

    def _inside(self, operation: Any) -> list[str]:
        """Return the loops and conditions around an operation, from the outermost."""
        around: list[str] = []
        while (outer := self.outer.get(operation.get_block().get_parent().id())) is not None:
            if outer.get_name() == "tt.func":
                break
            is_loop = outer.get_name() == "scf.for"
            step = self.constants.get(outer.get_operand(2).id(), "?") if is_loop else ""
            around.insert(0, f" in {outer.get_name()} {step}")
            operation = outer
        return around
