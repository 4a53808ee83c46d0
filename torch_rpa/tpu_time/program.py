"""A listing as steps that change a ``Machine``.

In one bundle every operation reads its operands before any result is written, loads see memory before stores do, and a
branch is taken ``branch_delay`` bundles later. Scalars are 32-bit words, which comparisons may take as signed.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from torch_rpa.tpu_time.listing import Allocation, Operation
from torch_rpa.tpu_time.machine import Machine

Value = Callable[[Machine], int]
Effect = Callable[[Machine], None]

_MASK, _SIGN = 2**32 - 1, 2**31
_ADDRESS_BYTES = {"smem": 4, "sflag": 4, "vmem": 512}  # of one step of an address
_ABSOLUTE_BASE = 2**24  # where what stands at an absolute address is put instead, behind all memory of the kernel
_FIRST_PREDICATE = 32
_REGISTER = re.compile(r"%\w+_([sp])(\d+)$")
_SPILL_ADDRESS = re.compile(r"\[smem:\[(.*)\]\]$")
_CALL_OPERAND = re.compile(r"index: (\d+)")
_TARGET = re.compile(r"bundleno = (\d+)")


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


def _as_signed(function):
    return lambda a, b: function(_signed(a), _signed(b))


_UNARY = {"smov": lambda a: a, "pmov": lambda a: a, "pneg": operator.not_}
_BINARY = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smulhi.u32": lambda a, b: a * b >> 32,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "smin.u32": min,
    "smax.u32": max,
    "smin.s32": _as_signed(min),
    "smax.s32": _as_signed(max),
    "sshll.u32": lambda a, b: a << b,
    "sshrl.u32": operator.rshift,
    "sshra.s32": lambda a, b: _signed(a) >> b,
    **{f"scalar_lea.{space}": operator.add for space in ("hbm", "vmem", "smem", "sflag")},
    "por": lambda a, b: a or b,
    "pand": lambda a, b: a and b,
    "pnor": lambda a, b: not (a or b),
    "pnand": lambda a, b: not (a and b),
    "pxor": operator.ne,
    **{
        f"scmp.{name}.s32.totalorder": _as_signed(getattr(operator, name))
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"scmp.{name}.u32.totalorder": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}
# Of numbers for the vector units, such as sinks: what takes time does not depend on them. Comparing them is not known.
_FLOATS = ("sadd.f32", "ssub.f32", "smul.f32")
_IGNORED = ("sphi", "sfence")  # registers were assigned so that a phi has nothing to move


@dataclass
class Block:
    """Bundles that are issued one after the other: what happens, by offset, and where it goes on."""

    num_bundles: int
    steps: list[tuple[int, Effect]]
    target: int | None = None


@dataclass
class _Step:
    """One bundle's results, by register, effects, and copies of results of the same bundle."""

    results: list[tuple[int, Value]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, machine: Machine) -> None:
        values = [value(machine) for _, value in self.results]
        for effect in self.effects:
            effect(machine)
        for (register, _), value in zip(self.results, values, strict=True):
            machine.registers[register] = value
        for register, source in self.copies:
            machine.registers[register] = machine.registers[source]


class Program:
    """The blocks of a listing.

    Raises:
        NotImplementedError: an operation that is not known, in a place where it may decide what happens.
    """

    def __init__(
        self,
        bundles: list[list[Operation]],
        allocations: dict[str, Allocation],
        branch_delay: int,
        divisions: dict[str, str] | None = None,
    ) -> None:
        self._allocations, self._divisions = allocations, divisions or {}
        operations = [operation for bundle in bundles for operation in bundle]
        self._num_taken = Counter(operation.operands[0] for operation in operations if operation.code == "spop.drf")
        # Addresses of operands in HBM count 512 bytes where the program shifts them, otherwise granules.
        is_shifted = any(operation.code == "int_to_ptr.hbm" for operation in operations)
        self._operand_shift = {"hbm": 4 if is_shifted else 0, "vmem": 4}
        self._blocks = self._make_blocks(bundles, branch_delay)

    def run(self, machine: Machine, most_cycles: int) -> None:
        """From the first bundle to the end. Raises RuntimeError for a program that cannot be right."""
        at = 0
        while at in self._blocks:
            at = _run_block(machine, self._blocks[at], at)
            if machine.now > most_cycles:
                raise RuntimeError(f"the kernel takes more than {most_cycles} cycles")
        machine.check_end()

    def _make_blocks(self, bundles, branch_delay: int) -> dict[int, Block]:
        branches = {i: _target(op) for i, bundle in enumerate(bundles) for op in bundle if op.code == "sbr.rel"}
        after = {i + branch_delay + 1: target for i, target in branches.items()}
        starts = sorted({0, len(bundles), *branches.values(), *after})
        blocks = {}
        for start, stop in pairwise(starts):
            steps = [(i - start, self._step(bundles[i])) for i in range(start, stop) if bundles[i]]
            blocks[start] = Block(stop - start, steps, after.get(stop))
        return blocks

    def _step(self, bundle: list[Operation]) -> _Step:
        step, written = _Step(), {operation.result for operation in bundle}
        for operation in bundle:
            register = _register(operation.result)
            if operation.code in _IGNORED:
                continue
            if register is None:
                step.effects.append(self._guarded_effect(operation))
            elif operation.code.startswith("int_to_ptr.") and operation.operands[0] in written:
                step.copies.append((register, _register(operation.operands[0])))
            else:
                step.results.append((register, self._guarded_result(operation, register)))
        return step

    # ---- Results ------------------------------------------------------------------------------------------------

    def _guarded_result(self, operation: Operation, register: int) -> Value:
        value = self._result(operation)
        if operation.guard is None:
            return value
        guard = self._guard(operation.guard)
        otherwise = self._operand(operation.otherwise) if operation.otherwise else lambda m: m.registers[register]
        return lambda m: value(m) if guard(m) else otherwise(m)

    def _result(self, operation: Operation) -> Value:
        code, operands = operation.code, operation.operands
        if code.startswith("inlined_call_operand."):
            return self._call_operand(code.partition(".")[2], int(_CALL_OPERAND.search(" ".join(operands))[1]))
        if code == "sld":
            return _load(self._address(operands[0]))
        if code == "vpop.sfrf":
            return lambda m: m.results.popleft()
        if code == "spop.drf":
            return lambda m: m.divided[operands[0]].popleft()
        if code in _FLOATS:
            return lambda m: 0
        values = [self._operand(operand) for operand in operands]
        if code == "scalar_select":
            condition, a, b = values
            return lambda m: a(m) if condition(m) else b(m)
        if code.startswith("int_to_ptr.") or code in _UNARY:
            function, (a,) = _UNARY.get(code, lambda a: a), values
            return lambda m: function(a(m))
        if code in _BINARY:
            function, (a, b) = _BINARY[code], values
            return lambda m: function(a(m), b(m)) & _MASK
        raise NotImplementedError(f"operation {code} of libtpu's listing is not known")

    def _call_operand(self, space: str, index: int) -> Value:
        if space in self._operand_shift:
            shift = self._operand_shift[space]
            return lambda m: m.operand_granule(index) >> shift
        return lambda m: m.scalar(index)

    # ---- Effects ------------------------------------------------------------------------------------------------

    def _guarded_effect(self, operation: Operation) -> Effect:
        if operation.code == "sbr.rel":
            guard = self._guard(operation.guard) if operation.guard else lambda m: True
            return lambda m: setattr(m, "takes_branch", bool(guard(m)))
        effect = self._effect(operation)
        if operation.guard is None:
            return effect
        guard = self._guard(operation.guard)
        return lambda m: effect(m) if guard(m) else None

    def _effect(self, operation: Operation) -> Effect:
        code, operands = operation.code, operation.operands
        if code == "shalt.err":
            return _halt
        if code == "sst":
            address, value = self._address(operands[0]), self._operand(operands[1])
            return lambda m: m.smem.__setitem__(address(m), value(m))
        if code == "sdivrem.u32":
            return self._division(operation)
        if code.startswith("dma.") and "_to_" in code:
            return self._dma(code, operands)
        values = [self._operand(operand) for operand in operands]
        methods = {
            "dma.done.wait": Machine.wait,
            "vsyncadd": Machine.add,
            "vsyncpa": Machine.set,
            "vsyncmov": Machine.read,
        }
        if code in methods:
            return lambda m: methods[code](m, *(value(m) for value in values))
        raise NotImplementedError(f"operation {code} of libtpu's listing is not known")

    def _division(self, operation: Operation) -> Effect:
        """Of two results that are taken (v5e) the quotient comes first; of one (v6e), an earlier stage says which."""
        functions = {"div": operator.floordiv, "rem": operator.mod}
        if self._num_taken[operation.result] == 1:
            kind = self._divisions.get(operation.result)
            if kind is None:
                raise NotImplementedError(
                    "whether an sdivrem of libtpu's listing gives a quotient or a rest is not known"
                )
            functions = {kind: functions[kind]}
        a, b = (self._operand(operand) for operand in operation.operands)
        return lambda m: m.divided[operation.result].extend(f(a(m), b(m)) for f in functions.values())

    def _dma(self, code: str, operands: tuple[str, ...]) -> Effect:
        source, target = code.removeprefix("dma.").split("_to_")
        named = dict(operand.split("=", 1) for operand in operands)
        places = (source, target) if source in named else ("src", "dst")  # a general DMA
        names = (*places, "size_in_granules", "dst_syncflagno")
        values = [self._operand(named[name]) for name in names]
        return lambda m: m.start_dma(source, target, *(value(m) for value in values))

    # ---- Operands -----------------------------------------------------------------------------------------------

    def _guard(self, text: str) -> Value:
        value = self._operand(text.removeprefix("!"))
        return (lambda m: not value(m)) if text.startswith("!") else value

    def _operand(self, text: str) -> Value:
        """A register, a number, or an allocation's address; a label, or a note of what an address belongs to, may
        stand beside it."""
        text = text.partition("=")[2] or text
        if text.startswith("["):
            return self._sum(text[1:-1])
        text = text.split(" ")[0]
        register = _register(text)
        if register is not None:
            return lambda m: m.registers[register]
        if not text.isdecimal():
            raise NotImplementedError(f"operand {text} of libtpu's listing is not known")
        number = int(text)
        return lambda m: number

    def _address(self, text: str) -> Value:
        return self._sum(_SPILL_ADDRESS.match(text)[1])

    def _sum(self, text: str) -> Value:
        """``#allocation12 + $0x3``, ``#allocation12 + %s4_s5``, or the sum of two registers."""
        terms = [self._term(term) for term in text.split(" + ")]
        return terms[0] if len(terms) == 1 else lambda m: sum(term(m) for term in terms) & _MASK

    def _term(self, text: str) -> Value:
        if text.startswith("#"):
            address = self._allocated(text[1:])
            return lambda m: address
        if text.startswith("$"):
            return lambda m, offset=int(text[1:], 16): offset
        return self._operand(text)

    def _allocated(self, name: str) -> int:
        allocation = self._allocations[name]
        step = _ADDRESS_BYTES[allocation.space]
        return allocation.offset // step + (_ABSOLUTE_BASE if allocation.is_absolute else 0)


def _run_block(machine: Machine, block: Block, start: int) -> int:
    """The number of the bundle that comes next."""
    machine.takes_branch, first = False, machine.issued
    for offset, step in block.steps:
        machine.issued = first + offset
        step(machine)
    machine.issued = first + block.num_bundles
    return block.target if machine.takes_branch else start + block.num_bundles


def _register(text: str) -> int | None:
    """Its number among all registers; None if the text names none."""
    match = _REGISTER.match(text)
    return None if match is None else int(match[2]) + (_FIRST_PREDICATE if match[1] == "p" else 0)


def _target(operation: Operation) -> int:
    return int(_TARGET.search(" ".join(operation.operands))[1])


def _load(address: Value) -> Value:
    def load(machine: Machine) -> int:
        at = address(machine)
        if at not in machine.smem and at < _ABSOLUTE_BASE:
            raise RuntimeError(f"the kernel reads word {at:#x} of scalar memory, which nothing has written")
        return machine.smem.get(at, 0)  # absolute ones: null, and the core's number

    return load


def _halt(machine: Machine) -> None:
    raise RuntimeError("the kernel stops with an error of its own, such as a DMA out of bounds")
