"""PTX as rows of numbers that native/ptx_machine.h executes.

Opcodes lose what changes nothing there (cache hints, ``.rn`` where nothing else is), registers become offsets into the
file of a warp, and numbers registers that hold them. What is not known raises.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from ptx_text import Body, Part, Statement, contracted, parameter, shared_symbols

LANES = 32
SPECIALS = {"%tid.x": 0, "%ctaid.x": 1, "%ntid.x": 2, "%nctaid.x": 3, "%laneid": 4, "%warpid": 5}
SPECIALS |= dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 6)
SPECIALS |= dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"), 7)
"""As in native/ptx_machine.h; the launches that there are have one dimension."""
ZERO, PARAMETERS, SPECIAL_COUNT, SPECIAL_BYTES = 6, 8, 9, LANES * 8
SPACES = {"global": 0, "shared": 1, "generic": 2, "param": 3}
RESULTS: dict[str, tuple[int, int | None]] = {"ld": (7, None), "take_apart": (3, None), "ldmatrix": (4, None)}
RESULTS |= {"predicates": (1, 2), "setp": (0, 2), "shfl": (1, 3), "vote": (1, 2), "redux": (1, 2), "mma": (1, 5)}
RESULTS |= {"wgmma.m64n16k8.tf32": (1, 9), "wgmma.m64n32k8.tf32": (1, 17), "stmatrix": (0, 0)}
RESULTS |= {"bar": (2, 3)} | dict.fromkeys(("st", "bra", "exit", "trap", "nothing", "bar.warp.sync"), (0, 0))
"""Which operands of a row are results; of other opcodes the first."""
Operand = tuple[int, int]
"""The offset of a register and its bytes; or a number, and 0."""
Made = tuple[str, list[Operand]]


class Row(NamedTuple):
    """An instruction; ``guard`` is a predicate's register, -1 for none."""

    name: str
    operands: list[Operand]
    guard: int = -1
    negated: bool = False
    line: int = 0


class Kernel(NamedTuple):
    name: str
    rows: list[Row]
    parameters: list[tuple[int, int]]  # bytes and alignment
    constants: list[tuple[int, int, int]]  # offset, bytes and value
    file_bytes: int
    shared_bytes: int
    max_threads: int
    opcodes: Counter[str]


def kernels_of(text: str, *, contract: bool = False) -> list[Kernel]:
    """The entries of a PTX module; ``contract``: with products and sums contracted, as ptxas may.

    Raises:
        ValueError: there is something that the machine does not have.
    """
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^[ \t]*\.(?:loc|file)\b[^\n]*$", "", text)
    symbols, size = shared_symbols(text)
    ends = [m.start() for m in re.finditer("\n", text)]
    found = []
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        body = Body(text, entry.end(), ends)
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", entry[3])
        parameters = [parameter(p) for p in entry[2].split(",") if p.strip()]
        translator = _Translator(parameters, symbols)
        statements = list(body.statements())
        rows = translator.rows(contracted(statements) if contract else statements)
        found.append(
            Kernel(
                name=entry[1],
                rows=rows,
                parameters=[(size, alignment) for _, size, alignment in parameters],
                constants=[(offset, width, value) for (value, width), offset in translator.constants.items()],
                file_bytes=translator.used,
                shared_bytes=size,
                max_threads=int(threads[1]) if threads else 0,
                opcodes=Counter(s.opcode for s in statements if isinstance(s, Statement)),
            )
        )
    return found


class _Translator:
    def __init__(self, parameters: list[tuple[str, int, int]], symbols: dict[str, int]) -> None:
        self.symbols, self.used = symbols, SPECIAL_COUNT * SPECIAL_BYTES
        self.constants: dict[tuple[int, int], int] = {}
        self._scopes: list[dict[str, Operand]] = [{}]
        self._parameters, at = dict[str, int](), 0
        for name, size, alignment in parameters:
            at = -(-at // alignment) * alignment
            self._parameters[name] = at
            at += size

    def rows(self, statements: list[Part]) -> list[Row]:
        labels, rows = dict[str, int](), list[Row]()
        jumps = list[tuple[int, str]]()
        for s in statements:
            if isinstance(s, str):
                labels[s] = len(rows)
            elif not isinstance(s, Statement):
                self._declare(*s)
            else:
                guard = self.register(s.guard)[0] if s.guard else -1
                try:
                    name, operands = self.instruction(s)
                except (KeyError, ValueError, IndexError) as error:
                    raise ValueError(f"line {s.line}: {s.opcode} {', '.join(s.operands)}: {error!r}") from error
                if name == "bra":
                    jumps.append((len(rows), s.operands[0]))
                rows.append(Row(name, operands, guard, s.negated, s.line))
        for k, label in jumps:
            rows[k] = rows[k]._replace(operands=[(labels[label], 0)])
        self._check_that_registers_are_written(rows)
        last = rows[-1].line if rows else 0
        return [*rows, Row("exit", [], line=last)]

    def _check_that_registers_are_written(self, rows: list[Row]) -> None:
        """By any instruction: what an empty asm statement leaves to chance shows here."""
        known = {*range(0, SPECIAL_COUNT * SPECIAL_BYTES, SPECIAL_BYTES), *self.constants.values()}
        read = dict[int, int]()
        for row in rows:
            name = row.name if row.name in RESULTS else row.name.partition(".")[0]
            results = range(len(row.operands))[slice(*RESULTS.get(name, (0, 1)))]
            known |= {value for k, (value, width) in enumerate(row.operands) if width and k in results}
            guard = [row.guard] if row.guard >= 0 else []
            for value in [*guard, *(v for k, (v, width) in enumerate(row.operands) if width and k not in results)]:
                read.setdefault(value, row.line)
        if unwritten := {line for value, line in read.items() if value not in known}:
            raise ValueError(f"line {min(unwritten)}: a register that nothing writes")

    def _declare(self, kind: str, names: str) -> None:
        if kind == "{":
            self._scopes.append({})
        elif kind == "}":
            self._scopes.pop()
        elif kind != "nothing":
            width = 8 if kind[-2:] == "64" else 4
            for name in names.split(","):
                if m := re.fullmatch(r"(%\w+?)<(\d+)>", name.strip()):
                    for k in range(int(m[2])):
                        self._scopes[-1][f"{m[1]}{k}"] = (self._take(width), width)
                else:
                    self._scopes[-1][name.strip()] = (self._take(width), width)

    def _take(self, width: int) -> int:
        self.used += LANES * width
        return self.used - LANES * width

    def register(self, name: str) -> Operand:
        """Offset and bytes."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise ValueError(f"no register {name}")

    def number(self, value: int, width: int) -> Operand:
        """A register that holds it."""
        key = (value & (2 ** (8 * width) - 1), width)
        if key not in self.constants:
            self.constants[key] = self._take(width)
        return self.constants[key], width

    def operand(self, text: str, width: int = 4) -> Operand:
        """A register, of what is a number too."""
        if text in SPECIALS:
            return SPECIALS[text] * SPECIAL_BYTES, 4
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return self.number(int(text[2:], 16), width)
        if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.number(int(text.rstrip("U"), 0), width)
        if text in self.symbols:
            return self.number(self.symbols[text], width)
        return self.register(text)

    def predicate(self, text: str) -> list[Operand]:
        """A register and whether it is negated."""
        return [self.operand(text.removeprefix("!")), (int(text.startswith("!")), 0)]

    def target(self, text: str) -> Operand:
        return (-1, 0) if text == "_" else self.register(text)

    def mask(self, text: str) -> Operand:
        return self.operand(text)

    def address(self, text: str) -> list[Operand]:
        """Base, its bytes and the offset."""
        m = re.fullmatch(r"\[\s*([\w%$.]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if m is None:
            raise ValueError(f"address {text}")
        offset = int(m[2] or "0", 0)
        if m[1] in self._parameters:
            return [(PARAMETERS * SPECIAL_BYTES, 8), (8, 0), (offset + self._parameters[m[1]], 0)]
        base = self.operand(m[1])
        return [base, (base[1], 0), (offset, 0)]

    def instruction(self, s: Statement) -> Made:
        name, *rest = s.opcode.split(".")
        kind = rest[-1] if rest else ""
        special = {"ld": self._transfer, "st": self._transfer, "mov": self._move, "cvt": self._convert}
        special |= {"setp": self._compare, "bar": self._barrier, "barrier": self._barrier, "shfl": self._shuffle}
        special |= {"vote": self._vote, "redux": self._reduce, "mma": self._product, "ldmatrix": self._matrices}
        special |= {"stmatrix": self._matrices, "wgmma": self._group_product, "fence": self._fence}
        if name in special:
            return special[name](s, rest)
        if name in ("bra", "trap"):
            return name, []
        if name in ("ret", "exit"):
            return "exit", []
        if name == "cvta":
            return "mov.b64", [self.register(s.operands[0]), self.operand(s.operands[1], 8)]
        if kind == "pred":
            how = ("and", "or", "xor", "not").index(name)
            a = self.predicate(s.operands[1])
            b = self.predicate(s.operands[2]) if how < 3 else [(ZERO * SPECIAL_BYTES, 4), (0, 0)]
            return "predicates", [(how, 0), self.register(s.operands[0]), *a, *b]
        return self._plain(s, name, rest)

    def _plain(self, s: Statement, name: str, rest: list[str]) -> Made:
        """Operands of the type in the opcode's name, but for the shift, the selector, and what is wide."""
        *modifiers, kind = rest
        if kind[0] == "f" or modifiers[:1] == ["approx"]:
            modifiers = [m for m in modifiers if m != "rn"]
        if name in ("selp", "and", "or", "xor", "not", "shl", "prmt", "lop3", "popc", "clz", "bfi", "brev"):
            kind = "b" + kind[1:]
        if name == "shr":
            kind = kind.replace("b", "u")
        width = 8 if kind[1:] == "64" else 4
        widths = [width] * len(s.operands)
        if "wide" in modifiers:
            widths[0] = 2 * int(kind[1:]) // 8
            widths[3:] = widths[:1] * (len(widths) - 3)
        if name in ("shl", "shr", "shf"):
            widths[-1] = 4
        if name in ("bfe", "bfi"):
            widths[-2:] = [4, 4]
        if name in ("popc", "clz"):
            widths[0] = 4
        operands = [self.operand(text, w) for text, w in zip(s.operands, widths, strict=True)]
        return ".".join((name, *modifiers, kind)), operands

    def _transfer(self, s: Statement, rest: list[str]) -> Made:
        is_load = s.opcode.startswith("ld")
        known = {*SPACES, "v2", "v4"}
        if unknown := [m for m in rest[:-1] if m not in known]:
            raise ValueError(f"unknown {unknown}")
        kind, space = rest[-1], next((m for m in rest if m in SPACES), "generic")
        values, where = s.operands if is_load else reversed(s.operands)
        size = int(kind[1:]) // 8
        texts = [t.strip() for t in values.strip("{}").split(",")]
        registers = [self.target(t) if is_load else self.operand(t, max(size, 4)) for t in texts]
        head = [(SPACES[space], 0), (len(texts), 0), (size, 0), (int(kind[0] == "s"), 0), *self.address(where)]
        return s.opcode[:2], head + [x for r in registers for x in (r, (r[1], 0))]

    def _move(self, s: Statement, rest: list[str]) -> Made:
        to, value = s.operands
        size = 1 if rest[-1] == "pred" else int(rest[-1][1:]) // 8
        width = max(4, size)
        if "{" in to or "{" in value:
            parts = [t.strip() for t in (to if "{" in to else value).strip("{}").split(",")]
            head = [(size // len(parts), 0), (len(parts), 0)]
            if "{" in to:
                return "take_apart", [self.operand(value, width), *head, *(self.target(p) for p in parts)]
            return "put_together", [self.register(to), *head, *(self.operand(p) for p in parts)]
        if value in self._parameters:
            base = (PARAMETERS * SPECIAL_BYTES, 8)
            return "add.u64", [self.register(to), base, self.number(self._parameters[value], 8)]
        if rest[-1] == "pred":
            return "predicates", [(4, 0), self.register(to), *self.predicate(value), (ZERO * SPECIAL_BYTES, 4), (0, 0)]
        return f"mov.b{8 * size}", [self.register(to), self.operand(value, width)]

    def _convert(self, s: Statement, rest: list[str]) -> Made:
        *modifiers, to, source = rest
        flush = 8 * ("ftz" in modifiers)
        modifiers = [m for m in modifiers if m != "ftz"]
        roundings = {"rn": 0, "rni": 1, "rzi": 2, "rmi": 3, "rpi": 4, "sat": 5}
        if unknown := [m for m in modifiers if m not in roundings]:
            raise ValueError(f"unknown {unknown}")
        to, source = (t.replace("b", "u") for t in (to, source))
        register = self.register(s.operands[0])
        value = self.operand(s.operands[1], 8 if source[1:] == "64" else 4)
        rounding = flush + (roundings[modifiers[0]] if modifiers else 0)
        return f"cvt.{to}.{source}", [register, value, (rounding, 0), (register[1], 0), (value[1], 0)]

    def _compare(self, s: Statement, rest: list[str]) -> Made:
        comparison, *modifiers, kind = rest
        unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        kind = kind.replace("b", "u")
        width = 8 if kind[1:] == "64" else 4
        to, _, opposite = s.operands[0].partition("|")
        how = 1 + ("and", "or", "xor").index(modifiers[0]) if modifiers else 0
        other = self.predicate(s.operands[3]) if how else [(ZERO * SPECIAL_BYTES, 4), (0, 0)]
        return f"setp.{unsigned.get(comparison, comparison)}.{kind}", [
            self.register(to),
            self.register(opposite) if opposite else (-1, 0),
            *(self.operand(t, width) for t in s.operands[1:3]),
            other[0],
            (how, 0),
            other[1],
        ]

    def _barrier(self, s: Statement, rest: list[str]) -> Made:
        if rest[0] == "warp":
            return "bar.warp.sync", [self.mask(s.operands[0])]
        nobody, everybody = (-1, 0), (ZERO * SPECIAL_BYTES, 4)
        if rest[0] == "red":
            to, number, value = s.operands if len(s.operands) == 3 else (s.operands[0], s.operands[1], s.operands[3])
            negated = value.startswith("!")
            if negated or rest[1] not in ("or", "and"):
                raise ValueError("not known")
            head = [self.operand(number), everybody, self.register(to), self.register(value)]
            return "bar", [*head, (int(rest[1] == "and"), 0)]
        if rest[0] != "sync":
            raise ValueError("not known")
        count = self.operand(s.operands[1]) if len(s.operands) > 1 else everybody
        return "bar", [self.operand(s.operands[0]), count, nobody, everybody, (0, 0)]

    def _shuffle(self, s: Statement, rest: list[str]) -> Made:
        to, _, inside = s.operands[0].partition("|")
        value, lane, clamp, mask = (self.operand(t) for t in s.operands[1:])
        mode = ("up", "down", "bfly", "idx").index(rest[1])
        outcome = self.register(inside.strip()) if inside else (-1, 0)
        return "shfl", [mask, self.register(to.strip()), outcome, value, lane, clamp, (mode, 0)]

    def _vote(self, s: Statement, rest: list[str]) -> Made:
        mode = ("ballot", "all", "any", "uni").index(rest[1])
        value = self.predicate(s.operands[1])
        return "vote", [self.mask(s.operands[2]), self.register(s.operands[0]), *value, (mode, 0)]

    def _reduce(self, s: Statement, rest: list[str]) -> Made:
        to, value, mask = s.operands
        return f"redux.{rest[1]}.{rest[2]}", [self.mask(mask), self.register(to), self.operand(value)]

    def _product(self, s: Statement, rest: list[str]) -> Made:
        if rest != ["sync", "aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"]:
            raise ValueError("not known")
        registers = [self.operand(t.strip()) for o in s.operands for t in o.strip("{}").split(",")]
        return "mma.m16n8k8.tf32", [self.number(-1, 4), *registers]

    def _matrices(self, s: Statement, rest: list[str]) -> Made:
        if "trans" in rest or rest[2] != "m8n8":
            raise ValueError("not known")
        is_load = s.opcode.startswith("ld")
        values, where = s.operands if is_load else reversed(s.operands)
        registers = [self.operand(t.strip()) for t in values.strip("{}").split(",")]
        base, _, offset = self.address(where)
        return s.opcode[:8], [self.number(-1, 4), (len(registers), 0), base, offset, *registers]

    def _group_product(self, s: Statement, rest: list[str]) -> Made:
        if rest[0] in ("fence", "commit_group", "wait_group"):
            return "nothing", []
        to, a, descriptor, adds, *signs = s.operands
        size = rest.pop(3)
        if rest != ["mma_async", "sync", "aligned", "f32", "tf32", "tf32"] or signs != ["1", "1"]:
            raise ValueError("not known")
        registers = [self.operand(t.strip()) for o in (to, a) for t in o.strip("{}").split(",")]
        return f"wgmma.{size}.tf32", [self.number(-1, 4), *registers, self.operand(descriptor), self.operand(adds)]

    def _fence(self, s: Statement, rest: list[str]) -> Made:
        if rest != ["proxy", "async"]:
            raise ValueError("not known")
        return "nothing", []
