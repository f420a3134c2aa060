"""Costs of a compiled program, read from the text of its optimised HLO.

    program = count(compiled.as_text(), scope="/attention/")
    program.flops, program.scope_flops, program.bytes, program.collectives

XLA's own cost_analysis() counts the body of a loop once, so a scan over 32 layers counts as one,
and it answers -1 s for what it cannot time. Here a body counts as often as it runs, wherever its
condition compares with a constant. Loops whose trips depend on data (the key tiles that a query
tile meets) are counted apart, one trip each: only the caller knows how many there are. With them
are Pallas kernels, which nothing can look into, by the estimate that they carry: of ours, of all
tiles. Apart, too, are products whose op_name contains `scope`: what the caller has a formula for.

All figures are of one device. FLOPs are of matrix products alone, 2 for a multiply-add.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from core.compile.hlo_text import Computation, Instruction, Shape, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# Opcodes that move nothing: names for values, control flow (its body is visited), ends of pairs.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async-start",
    "async-update",
}  # fmt: skip
# What writes into its first operand in place, and which operand is written there.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of one kind in one run of the program."""

    kind: str
    asynchronous: bool  # the compiler lets other work run between its start and its end
    count: int
    bytes: int  # of the larger side, operand or result, over all executions


@dataclasses.dataclass(frozen=True)
class Program:
    """`loop_*` are of loops with an unknown number of trips, as if each made one, and of kernels.

    No product is in two of the three: in a loop, else in the scope, else in `flops`.
    """

    flops: float
    scope_flops: float
    loop_flops: float
    bytes: float
    loop_bytes: float
    collectives: tuple[Collective, ...]


def count(text: str, scope: str) -> Program:
    """Counts the program whose optimised HLO is `text`."""
    entry, computations = parse(text)
    return _Counter(computations, scope).run(entry)


class _Counter:
    """Walks the computations that run, with how often each does."""

    def __init__(self, computations: dict[str, Computation], scope: str):
        self.computations, self.scope = computations, scope
        self.flops = collections.Counter()  # by (in a loop, in the scope)
        self.bytes = collections.Counter()  # by in a loop
        self.collectives = collections.defaultdict(lambda: [0, 0])
        self.fused_flops = functools.cache(self._fused_flops)

    def run(self, entry: str) -> Program:
        self.visit(entry, times=1, in_loop=False)
        found = (
            Collective(*key, count, num_bytes)
            for key, (count, num_bytes) in sorted(self.collectives.items())
        )
        flops, num_bytes = self.flops, self.bytes
        in_loops = flops[True, False] + flops[True, True]
        return Program(
            flops[False, False],
            flops[False, True],
            in_loops,
            num_bytes[False],
            num_bytes[True],
            tuple(found),
        )

    def visit(self, name: str, times: int, in_loop: bool) -> None:
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = self.trips(instruction.calls["condition"])
                body = instruction.calls["body"]
                self.visit(body, times * (trips or 1), in_loop or trips is None)
            elif instruction.opcode in ("call", "conditional"):
                for callee in instruction.calls.values():  # of branches each: an upper bound
                    self.visit(callee, times, in_loop)
            elif estimate := instruction.estimate():
                flops, num_bytes = estimate
                self.flops[True, False] += times * flops
                self.bytes[True] += times * num_bytes
            else:
                self.collective(instruction, computation, times)
                for in_scope, flops in self.products(instruction, computation).items():
                    self.flops[in_loop, in_scope] += times * flops
                self.bytes[in_loop] += times * self.traffic(instruction, computation)

    def trips(self, condition: str) -> int | None:
        """Trips of a loop that counts up from 0 by 1, as scans do; None if data decides."""
        computation = self.computations[condition]
        root = next(i for i in computation.values() if i.root)
        compared = [computation[name] for name in root.operands]
        if root.opcode == "fusion":
            inner, outer = self.computations[root.calls["calls"]], compared
            root = next(i for i in inner.values() if i.root)
            compared = [inner[name] for name in root.operands]
            compared = [outer[int(i.literal)] if i.opcode == "parameter" else i for i in compared]
        limits = [i.literal for i in compared if i.opcode == "constant"]
        return int(limits[0]) if root.opcode == "compare" and limits else None

    def products(self, instruction: Instruction, computation: Computation) -> dict[bool, float]:
        """FLOPs by whether they are in the scope."""
        if instruction.opcode == "fusion":
            return self.fused_flops(instruction.calls["calls"])
        if instruction.opcode not in ("dot", "convolution"):
            return {}
        shapes = [computation[name].shapes[0] for name in instruction.operands]
        flops = (_dot if instruction.opcode == "dot" else _convolution)(instruction, *shapes)
        return {self.scope in instruction.attribute("op_name"): flops}

    def _fused_flops(self, name: str) -> dict[bool, float]:
        computation, total = self.computations[name], collections.Counter()
        for instruction in computation.values():
            total.update(self.products(instruction, computation))
        return total

    def collective(self, instruction: Instruction, computation: Computation, times: int) -> None:
        """Counts a collective at its start: plain, as a `-start`, or in a fusion of the TPU's."""
        opcode = instruction.opcode
        kind, asynchronous = opcode.removesuffix("-start"), opcode.endswith("-start")
        if opcode in ("fusion", "async-start"):
            inner = self.computations[instruction.calls["calls"]]
            found = [i for i in inner.values() if i.opcode in COLLECTIVES]
            # The fusions after a start carry on what it began; -done ends it.
            begins = instruction.name.startswith("async-collective-start")
            whole = instruction.kind == "kCustom" and "done" not in instruction.name
            if not found or not (begins or whole or opcode == "async-start"):
                return
            kind, asynchronous = found[0].opcode, begins or opcode == "async-start"
            if kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in inner.values()):
                kind = "reduce-scatter"  # fused: sum, and keep the own part
            instruction, computation = found[0], inner
        if kind not in COLLECTIVES:
            return
        operands = sum(computation[n].shapes[0].bytes for n in instruction.operands)
        larger = max(operands, *(shape.bytes for shape in instruction.shapes))
        entry = self.collectives[kind, asynchronous]
        entry[0] += times
        entry[1] += times * larger

    def traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that the instruction reads from and writes to HBM; slices count as slices."""
        opcode, shapes = instruction.opcode, instruction.shapes
        if opcode in FREE or opcode.endswith("-done"):
            return 0
        operands = [computation[name].shapes for name in instruction.operands]
        if opcode == "fusion":
            inner = self.computations[instruction.calls["calls"]]
            reads = sum(
                self.read(inner, index) if any(s.in_hbm for s in shapes) else 0
                for index, shapes in enumerate(operands)
            )
            return reads + self.written(inner, shapes)
        if opcode == "dynamic-slice":
            return 2 * shapes[0].hbm_bytes
        if opcode in UPDATES:
            return 2 * operands[UPDATES[opcode]][0].bytes * operands[0][0].in_hbm
        if opcode == "slice-start":  # a prefetch: (operand, slice, context)
            return shapes[1].bytes * operands[0][0].in_hbm + shapes[1].hbm_bytes
        if opcode.endswith("-start"):
            shapes = shapes[:1]
        return sum(s.hbm_bytes for group in (*operands, shapes) for s in group)

    def read(self, computation: Computation, index: int) -> float:
        """Bytes of parameter `index` that a fused computation reads."""
        parameter = next(
            i for i in computation.values() if i.opcode == "parameter" and i.literal == str(index)
        )
        total = 0.0
        for user in computation.values():
            if parameter.name not in user.operands or user.opcode in COLLECTIVES:
                continue  # a collective's traffic is counted where it begins
            if user.opcode == "dynamic-slice":
                total += user.shapes[0].bytes
            elif user.opcode == "fusion":
                at = user.operands.index(parameter.name)
                total += self.read(self.computations[user.calls["calls"]], at)
            elif user.opcode in UPDATES and user.operands[0] == parameter.name:
                continue
            elif user.opcode not in ("tuple", "get-tuple-element"):
                total = math.inf
        return min(total, sum(shape.bytes for shape in parameter.shapes))

    def written(self, computation: Computation, shapes: tuple[Shape, ...]) -> float:
        """Bytes of a fusion's results: an update in place writes the update alone."""
        root = next(i for i in computation.values() if i.root)
        roots = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for value, shape in zip(roots, shapes, strict=False):
            while value.opcode == "bitcast":
                value = computation[value.operands[0]]
            if value.opcode in UPDATES:
                update = value.operands[UPDATES[value.opcode]]
                total += computation[update].shapes[0].bytes * shape.in_hbm
            elif value.opcode not in ("parameter", "get-tuple-element", *COLLECTIVES):
                total += shape.hbm_bytes
        return total


def _dot(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    contracted = instruction.numbers("lhs_contracting_dims")
    size = math.prod(lhs.dims[int(d)] for d in contracted if d)
    return 2.0 * math.prod(instruction.shapes[0].dims) * size


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> float:
    """TPUs write products as convolutions, batch dims as windows that meet each element once.

    Counted as XLA does: pairs of output and window position that fall on an element, not on
    padding or a hole of the dilation.
    """
    labels = re.split("_|->", instruction.attribute("dim_labels"))
    (lhs_at, rhs_at, out_at), out = labels, instruction.shapes[0]
    flops = 2.0 * out.dims[out_at.index("b")] * out.dims[out_at.index("f")]
    flops *= rhs.dims[rhs_at.index("i")]
    window = instruction.window()
    for axis in filter(str.isdigit, out_at):
        low, stride, hole, step = (
            window[key][int(axis)] for key in ("pad", "stride", "lhs_dilate", "rhs_dilate")
        )
        at = stride * np.arange(out.dims[out_at.index(axis)])[:, None] - low
        at = at + step * np.arange(rhs.dims[rhs_at.index(axis)])
        inside = (at >= 0) & (at % hole == 0) & (at // hole < lhs.dims[lhs_at.index(axis)])
        flops *= inside.sum()
    return float(flops)
