"""The text of optimised HLO as instructions: shapes, operands and the attributes we read."""

import dataclasses
import functools
import math
import re

SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
HEAD = re.compile(r"(?:ENTRY )?%([^\s(]+) .*\{$")
LINE = re.compile(r"\s+(ROOT )?%([^\s]+) = (.*)$")
CALLS = re.compile(
    r"\b(calls|condition|body|to_apply|true_computation|false_computation)=%([^\s,]+)"
)
ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the types whose names do not end in their bits


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its dims, its bytes, and whether it lives in the device's main memory."""

    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are those of the result, a tuple flattened."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses: of constants and parameters a number
    rest: str  # the attributes
    root: bool

    @property
    def calls(self) -> dict[str, str]:
        """Computations that it runs, by attribute; branches of a conditional are numbered."""
        found = dict(CALLS.findall(self.rest))
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        names = re.findall(r"%([^\s,]+)", branches[1]) if branches else ()
        return found | {str(i): name for i, name in enumerate(names)}

    @property
    def kind(self) -> str:
        return self.attribute("kind")

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=([^\s,]+)", self.rest)
        return found[1] if found else ""

    def numbers(self, name: str) -> list[str]:
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.rest)
        return found[1].split(",") if found else []

    def estimate(self) -> tuple[int, int] | None:
        """(FLOPs, bytes) that a kernel is said to take, where it says so."""
        found = ESTIMATE.search(self.rest) if self.opcode == "custom-call" else None
        return (int(found[1]), int(found[2])) if found else None

    def window(self) -> dict[str, list[int]]:
        """Returns low padding, stride and dilations of a convolution, by spatial dim."""
        found = re.search(r"window=\{([^}]*)\}", self.rest)
        fields = dict(part.split("=") for part in found[1].split()) if found else {}
        rank = fields.get("size", "").count("x") + 1
        default = {"pad": "0_0", "stride": "1", "lhs_dilate": "1", "rhs_dilate": "1"}
        values = {key: fields.get(key, "x".join([one] * rank)) for key, one in default.items()}
        return {
            key: [int(part.split("_")[0]) for part in value.split("x")]
            for key, value in values.items()
        }


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """(name of the entry, computations by name)."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = HEAD.match(line)
            if head:
                current = computations[head[1]] = {}
                entry = head[1] if line.startswith("ENTRY") else entry
        elif found := LINE.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    return entry, computations


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, tail = text[end:].lstrip().partition("(")
    close = _closing("(" + tail, 0) - 1
    literal = tail[: close - 1]
    operands = tuple(re.findall(r"%([^\s,()]+)", literal))
    return Instruction(name, opcode, _shapes(text[:end]), operands, literal, tail[close:], root)


def _closing(text: str, start: int) -> int:
    """The end of the parenthesis that opens at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"no parenthesis closes {text[start : start + 80]!r}")


@functools.cache
def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*found) for found in SHAPE.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(d) for d in dims.split(",") if d)
    bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
    # S(n) in the layout is a memory space; none is HBM, 1 the vector memory, 5 the host.
    return Shape(sizes, math.ceil(math.prod(sizes) * bits / 8), "S(" not in layout)
