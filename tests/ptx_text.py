"""PTX as text: statements, labels, scopes and declarations of an entry, in the order they stand in."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

SHARED_BASE = 0x1000
"""An address of shared memory, as in native/ptx_machine.h."""
HINTS = re.compile(
    r"\.(?:nc|ca|cg|cs|lu|cv|wb|wt|weak|relaxed|volatile|gpu|cta|sys|L1::\w+|L2::\w+|shared::cta|uni)(?![\w:])"
)


class Statement(NamedTuple):
    line: int
    guard: str  # a predicate's register, "" for none
    negated: bool
    opcode: str
    operands: list[str]


Part = Statement | str | tuple[str, str]
"""A label is a string; ("{", "") and ("}", "") are scopes, (type, names) declares registers."""


def shared_symbols(text: str) -> tuple[dict[str, int], int]:
    """Where arrays of shared memory begin, and the bytes of those whose size is known."""
    symbols, size = dict[str, int](), 0
    pattern = r"(?m)^\s*(?:\.extern|\.visible)?\s*\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\];"
    for m in sorted(re.finditer(pattern, text), key=lambda m: not m[3]):
        size = -(-size // int(m[1])) * int(m[1])
        symbols[m[2]] = SHARED_BASE + size
        size += int(m[3] or 0)
    for m in re.finditer(r"(?m)^\s*(?:\.visible\s+)?\.(?:global|const|local)\s[^;]*?\s([\w$]+)(?:\[[^;]*)?;", text):
        if len(re.findall(rf"(?<![\w$]){re.escape(m[1])}(?![\w$])", text)) > 1:  # or nothing uses it
            raise ValueError(f"memory that the machine does not have: {m[0].strip()}")
    return symbols, size


def parameter(text: str) -> tuple[str, int, int]:
    """Name, bytes and alignment."""
    if m := re.search(r"\.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
        return m[2], int(m[3]), int(m[1])
    m = re.search(r"\.param\s+\.[a-z](\d+)", text)
    if m is None:
        raise ValueError(f"parameter {text!r}")
    size = int(m[1]) // 8
    return text.split()[-1], size, size


class Body:
    def __init__(self, text: str, begin: int, ends: list[int]) -> None:
        self._text, self._at, self._ends = text, begin, ends

    def statements(self) -> Iterator[Part]:
        """Labels as strings, scopes as ("{", "") and ("}", ""), declarations of registers as (type, names)."""
        depth = 1
        label, end = re.compile(r"([\w$]+):(?!:)"), re.compile(r"[^;]*;")
        while True:
            self._at = re.compile(r"\s*").match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._text[self._at] in "{}":
                depth += 1 if self._text[self._at] == "{" else -1
                if not depth:
                    return
                yield (self._text[self._at], "")
                self._at += 1
            elif m := label.match(self._text, self._at):
                yield m[1]
                self._at = m.end()
            else:
                m = end.match(self._text, self._at)
                assert m
                line = bisect.bisect(self._ends, self._at) + 1
                statement = " ".join(m[0][:-1].split())
                self._at = m.end()
                if statement.startswith(".reg"):
                    _, kind, names = statement.split(" ", 2)
                    yield (kind, names)
                elif statement.startswith(".pragma"):
                    continue
                elif statement.startswith("."):
                    raise ValueError(f"line {line}: {statement}")
                else:
                    yield self._statement(statement, line)

    @staticmethod
    def _statement(text: str, line: int) -> Statement:
        guard, negated = "", False
        if m := re.match(r"@(!?)(%\w+)\s+", text):
            guard, negated, text = m[2], bool(m[1]), text[m.end() :]
        opcode, _, rest = text.partition(" ")
        operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest)
        return Statement(line, guard, negated, HINTS.sub("", opcode), [o.strip() for o in operands if o.strip()])


def contracted(statements: list[Part]) -> list[Part]:
    """With a product that one sum uses in it, where neither has a rounding of its own."""
    text = " ".join(" ".join(s.operands) for s in statements if isinstance(s, Statement))
    uses = Counter(re.findall(r"%\w+", text))
    products, result = dict[str, tuple[int, Statement]](), list[Part]()
    for s in statements:
        if not isinstance(s, Statement):
            products.clear()
        elif s.opcode in ("mul.f32", "mul.f64") and not s.guard and uses[s.operands[0]] == 2:
            products[s.operands[0]] = (len(result), s)
        elif s.opcode in ("add.f32", "add.f64", "sub.f32", "sub.f64") and not s.guard:
            to, *terms = s.operands
            k = next((k for k in (0, 1) if terms[k] in products), None)
            if k is not None:
                at, product = products.pop(terms[k])
                result[at] = ("nothing", "")
                name = "fma" if s.opcode[:3] == "add" else ("fma.minus", "fma.from")[k]
                s = s._replace(opcode=name + s.opcode[3:], operands=[to, *product.operands[1:], terms[1 - k]])
        elif s.opcode.partition(".")[0] in ("bra", "ret", "exit", "bar"):
            products.clear()
        result.append(s)
    return result
