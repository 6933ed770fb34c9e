"""Mutation testing of the C++ CPU kernels: every arithmetic line is changed in turn, and a test must turn red.

    python tests/mutate.py [--sample N] [--seed S] [--files GLOB] [--output FILE]

Operators: sign, times and divided by, constant, comparison, logic, index ± 1, dropped statement. Sources and tests are
copied to a folder of their own, where an interrupted run is taken up again; the checkout is not touched. The widest
instruction set of this machine is built and tested, no other.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import multiprocessing as mp
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pybind11
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
COPIED = (
    *("CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
    *("csdiv", "csrc", "kernels", "bench", "studies", "tests"),
)
PLUMBING = ("thread_pool.*", "dispatch.*", "memory.*", "tile_kernels.h")

EXCLUDED: tuple[tuple[str, str, str], ...] = (
    ("partition.h", "constexpr int64_t kMaxBlocks", "speed only"),
    ("partition.h", "constexpr int64_t kLopsided", "speed only"),
    ("partition.h", "constexpr int64_t kCopies", "speed only"),
    ("gradient_sums.h", "constexpr int64_t kSlice", "speed only"),
    ("partition.h", "constexpr int64_t kCheapCopies", "speed only"),
    ("gradient_sweep.h", "constexpr double kRise", "speed only"),
    ("*.cpp", "threads = useful_threads(problem, threads);", "speed only"),
    ("mixture.h", "return elements ", "speed only"),
    ("gradient_sweep.h", "constexpr int64_t kSlab", "speed only"),
    ("gradient_sweep.h", "constexpr int64_t kRound", "speed only"),
    ("partition.h", "constexpr int64_t kValueTasks", "speed only"),
    ("gradient_sweep.h", "if (copies >= 0) merge_rows", "no copy has nothing to add"),
    ("self_overlap.cpp", "problem.p.log_weights = nullptr;", "the logits of rows read no weights of theirs"),
    ("gradient_sums.h", "recent_rows_[copy / stripes_ + stripe] = 0;", "merged more often than needed"),
    ("partition.h", "constexpr int64_t kBlockTiles", "speed only"),
    ("simd.h", "constexpr int kVectorBytes", "another instruction set"),
    ("simd.h", "__builtin_ia32_rcp", "another instruction set"),
    ("mixture.h", "const double elements", "speed only"),
    ("pack.cpp", "variance_min < (0 + 1)", "speed only"),
    ("pairwise.cpp", "uint32_t active = (0 + 1)", "speed only"),
    ("partition.h", "const int64_t column_sums", "any cut is right"),
    ("partition.h", "} else if (column_sums", "any cut is right"),
    ("partition.h", "partition.row_blocks = std::", "any cut is right"),
    ("partition.h", "partition.row_blocks = partition.column_groups", "any cut is right"),
    ("simd.h", "kVarianceMin = (", "the fast form is right a little beyond its limits"),
    ("simd.h", "kVarianceMax = (", "the fast form is right a little beyond its limits"),
    ("simd.h", "kDeltaMax = (", "the fast form is right a little beyond its limits"),
    ("pair.h", "variance_min > 0", "the exact form is right where the fast one is"),
    ("pair.h", "p.variance_min - q.variance_min", "the exact form is right where the fast one is"),
    ("pair.h", "tiny(raw_c <= ", "either is right at the limit"),
    ("gradient_sweep.h", "largest >= reference + kRise", "either is right at the limit"),
    ("gradient_sweep.h", "largest > reference - kRise", "any reference that does not overflow is right"),
    ("gradient_sums.h", "constexpr int64_t kRowsPerMerge", "precision only, by one row"),
    ("gradient_sums.h", "stripe_size() const { return (2 * dim_ + (1 + 1))", "more memory than is used"),
    ("gradient_sums.h", "stripe_size() const { return ((2 + 1) * dim_", "more memory than is used"),
    ("gradient_sums.h", "RowGradientSums::size(problem.p.n, problem.dim) : (0 + 1)),", "more memory than is used"),
    ("gradient_sums.h", "merged_copies_(rows_per_copy >= kRowsPerMerge", "either is right at the limit"),
    ("gradient_sums.h", "recent_rows + kTileRows >= kRowsPerMerge", "precision only, by one tile"),
    ("gradient_sweep.h", "problem.q.batch : (0 + 1), kNoReference", "more memory than is used"),
    ("cs_divergence.cpp", "if (!grads.wanted()) return;", "speed only"),
    ("pack.cpp", "return std::clamp(ceil_div(columns", "any cut is right"),
    ("simd.h", "k < F::kExpTerms; ++k) coefficients", "the last term of the series is below rounding"),
    ("simd.h", "Vec<T> series = broadcast<T>(T(1) / (", "the last term of the series is below rounding"),
    ("simd.h", "low = m <= broadcast", "either is right at the limit"),
    ("transpose.h", "max = min;", "the exact form is right where the fast one is"),
    ("transpose.h", "excess += numbers * (0 + 1)", "the exact form is right where the fast one is"),
    ("transpose.h", "-max_lane<T>(means.min)", "the exact form is right where the fast one is"),
    ("transpose.h", "-max_lane<T>(variances.min)", "the exact form is right where the fast one is"),
    ("transpose.h", "const bool past_caches", "speed only"),
    ("transpose.h", "end_of_stores_past_caches", "others would see stores late, if at all"),
    ("transpose.h", "for (int64_t k = 0; k < whole_count", "whole blocks are speed only"),
    ("scaled_gradients.cpp", "constexpr int64_t kSlice", "speed only"),
    ("partition.h", "constexpr int64_t kFew", "speed only"),
    ("partition.h", "return numbers", "speed only"),
    ("scale.cpp", "constexpr int64_t kItems", "speed only"),
    ("gradient_sums.h", "constexpr int64_t kLargeOutput", "speed only"),
    ("*", "prefetch", "speed only"),
    ("*", "upcoming", "speed only"),
    ("component_divergence.cpp", "const double exponent = ", "any scale near it serves"),
    ("component_divergence.cpp", "exponents_.get()[row] =", "any scale near it serves"),
    ("component_divergence.cpp", "if (d % kFactors", "any that does not underflow is right"),
    ("component_divergence.cpp", "int exponent = ", "of a zero, which has an infinite term: any scale serves"),
    ("component_divergence.cpp", "constexpr float kSteep", "both are right a little beyond the limits"),
    ("component_divergence.cpp", "constexpr int64_t kFactors", "any that does not underflow is right"),
    ("tile_kernels.cpp", "row + kRegisterRows < rows.count", "speed only"),
)
"""(file, snippet, reason): mutants whose line has the snippet in it, before or after, are not made."""

FAST = (
    "tests/test_contract.py",
    "-k",
    "cpu and (513-33-9 or 33-513-3 or 33-31-64 or 4-6 or variances1e or infweights or assign)"
    " and not cs_divergence-513 and not self_overlap-513",
)
FULL = (
    *("tests/test_contract.py", "tests/test_kernels_edges.py", "tests/test_near_zero.py", "tests/test_oracles.py"),
    *("tests/test_native.py", "tests/test_bad_inputs.py", "tests/test_bad_inputs_values.py"),
    *("tests/test_small_calls.py", "tests/test_extreme_gradients.py", "tests/test_component_divergence.py"),
    *("tests/test_mixture.py", "tests/test_mixture_conversions.py", "tests/test_mixture_densities.py"),
    "tests/test_properties.py",
    *("tests/test_nn.py", "-k", "not reference and not emulation and not instruction_set"),
)
SANITIZED = ("tests/test_sanitize.py",)  # for what the others let pass

# The sources are formatted: binary operators have spaces around them, references and template brackets have none.
OLD = ("+", "*", "+=", "*=", "<", ">", "==", "&&", "&", "<<")
NEW = ("-", "/", "-=", "/=", "<=", ">=", "!=", "||", "|", ">>")
FLIPPED = dict(zip(OLD, NEW, strict=True)) | dict(zip(NEW, OLD, strict=True)) | {"%": "/", "|=": "&="}
BINARY = re.compile(r"(?<=[\w)\]}] )([-+*/%&|<>=!]{1,2})(?= )")
NEGATION = re.compile(r"(?:(?<=[(\[{])|(?<=[=?:,*+/<>] )|(?<=return ))-(?=[\w(])")
NUMBER = re.compile(r"(?<![\w.])(0x[0-9a-f.]+(?:p-?\d+)?|\d+(?:\.\d+)?)f?(?![\w.])")
SUBSCRIPT = re.compile(r"(?<=[\w)\]])\[([^\[\]&]+)\]")
ARRAY = re.compile(r"\s*(?!return )(?:const )?[\w:]+(?:<.*?>)? \w+\[|.*\(&\w+\)\[")
STATEMENT = re.compile(
    r"(\s*)(?!return |using |const |auto )(?:if \(|for \(|\+\+|[\w.>()\[\]*+-]+ \S?= |[\w:.>-]+(?:<\w+>)?\().*;"
)
SKIPPED = re.compile(r"\s*(?:#|template|using |namespace |typedef )")


class Mutant(NamedTuple):
    file: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.after.strip()}"


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """The mutants of a source, line by line; EXCLUDED is not looked at."""
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split("//")[0].rstrip()
        if not code or SKIPPED.match(code):
            continue
        edits = [(m, FLIPPED[m[1]]) for m in BINARY.finditer(code) if m[1] in FLIPPED]
        edits += [(m, "") for m in NEGATION.finditer(code)]
        for m in NUMBER.finditer(code):
            doubled = float.fromhex(m[1]) != 0.0 if "p" in m[1] else "." in m[1] and float(m[1]) != 0.0
            edits.append((m, f"({m[0]} {'* 2' if doubled else '+ 1'})"))
        for m in () if ARRAY.match(code) else SUBSCRIPT.finditer(code):
            edits += [(m, f"[{m[1]} {sign} 1]") for sign in "+-"]
        edits += [(m, m[1] + ";") for m in [STATEMENT.fullmatch(code)] if m and code.count("(") == code.count(")")]
        changed = dict.fromkeys(code[: m.start()] + new + code[m.end() :] for m, new in edits)
        yield from (Mutant(file, number, code, after) for after in changed)


def sources() -> list[Path]:
    return sorted(path for path in CPU.rglob("*") if path.suffix in (".h", ".cpp"))


def all_mutants() -> tuple[list[Mutant], int]:
    """Every mutant that is not excluded, and how many are."""
    kept, excluded, used = [], 0, set()
    for path in sources():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in PLUMBING):
            continue
        for mutant in mutants_of(path.relative_to(CPU).as_posix(), path.read_text()):
            lines = (mutant.before, mutant.after)
            found = [e for e in EXCLUDED if fnmatch.fnmatch(path.name, e[0]) and any(e[1] in line for line in lines)]
            used.update(found)
            excluded += bool(found)
            kept += [] if found else [mutant]
    for file, snippet, _ in sorted(set(EXCLUDED) - used):
        print(f"stale exclusion, matches nothing: {file}: {snippet}")
    return kept, excluded


class Laboratory:
    """A copy of the sources with a build folder; ``try_mutant`` builds and tests one mutant in it."""

    def __init__(self) -> None:
        digest = hashlib.sha256()
        for path in sources():
            digest.update(path.read_bytes())
        self.folder = Path(tempfile.gettempdir()) / f"csdiv-mutation-{digest.hexdigest()[:12]}"
        self.tree, self.build = self.folder / "tree", self.folder / "build"
        for stale in (self.tree, self.build):  # a run that was killed left a mutant's object behind
            shutil.rmtree(stale, ignore_errors=True)
        self.tree.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.tree / name)
        for module in (self.tree / "csdiv").glob("_C.*"):
            module.unlink()
        self.results: dict[str, str] = {}
        self.survivors = set[str]()
        self.journal = self.folder / "results.jsonl"
        if self.journal.exists():  # tests are added, not taken away: what was caught stays so, the rest is tried again
            results = dict(json.loads(line) for line in self.journal.read_text().splitlines())
            self.survivors = {mutant for mutant, outcome in results.items() if outcome == "survived"}
            self.results = {mutant: outcome for mutant, outcome in results.items() if outcome != "survived"}

    def start(self) -> None:
        """Builds the unchanged sources for one instruction set and measures how long their tests take."""
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja
        isa = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
        options = ["-GNinja", "-DCMAKE_BUILD_TYPE=Release", "-DCSDIV_CUDA=OFF", f"-DCSDIV_ISAS={isa}"]
        options += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.tree / 'csdiv'}", f"-DPython_EXECUTABLE={sys.executable}"]
        options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(["cmake", "-S", self.tree, "-B", self.build, *options], check=True, stdout=subprocess.DEVNULL)
        if not self.compile():
            raise SystemExit(f"the sources do not build, see {self.folder / 'build.log'}")
        os.environ |= {"CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # CI: hypothesis draws the same examples every time
        sys.path[0] = str(self.tree)
        for module in ("csdiv.testing", "csdiv.nn", "hypothesis", "scipy.stats", "sklearn.mixture"):
            importlib.import_module(module)  # once, not in every fork; csdiv._C differs from mutant to mutant
        assert sys.modules["csdiv"].__file__ == str(self.tree / "csdiv" / "__init__.py")
        assert "csdiv._C" not in sys.modules
        self.limits = []
        for arguments in (FAST, FULL, SANITIZED):
            begin = time.perf_counter()
            if outcome := self.test(arguments, 3600.0):
                raise SystemExit(f"{outcome} without any mutation, see {self.folder / 'tests.log'}")
            self.limits.append(10.0 + 5.0 * (time.perf_counter() - begin))
            print(f"{arguments[0]} ...: {time.perf_counter() - begin:.1f} s unchanged", flush=True)

    def compile(self) -> bool:
        with (self.folder / "build.log").open("w") as log:
            return subprocess.run(["ninja", "-j1", "-C", self.build], stdout=log, stderr=log).returncode == 0

    def test(self, arguments: tuple[str, ...], limit: float) -> str:
        """Why the tests are red, in a fork of this process; empty if they are green."""
        child = mp.get_context("fork").Process(target=self._child, args=(arguments,))
        child.start()
        child.join(limit)
        hanging = child.exitcode is None
        if hanging:
            assert child.pid  # its own group: see _child
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
        assert child.exitcode != 5, "no test was selected"
        return "timeout" if hanging else f"exit code {child.exitcode}" if child.exitcode else ""

    def _child(self, arguments: tuple[str, ...]) -> None:
        os.setsid()
        os.chdir(self.tree)
        if arguments != SANITIZED:  # which maps terabytes
            resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))  # a mutant may ask for any amount of memory
        with (self.folder / "tests.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--durations=0", *arguments])))

    def try_mutant(self, mutant: Mutant) -> str:
        """What became of it: caught and why, build failure, or survived. A result of an earlier run is taken over."""
        if str(mutant) not in self.results:
            source = self.tree / "csrc" / "cpu" / mutant.file
            original = source.read_text()
            lines = original.splitlines(keepends=True)
            lines[mutant.line - 1] = mutant.after + "\n"
            source.write_text("".join(lines))
            try:
                outcome = "build failure"
                if self.compile():
                    stages = zip((FAST, FULL, SANITIZED), self.limits, strict=True)
                    red = next(filter(None, (self.test(stage, limit) for stage, limit in stages)), "")
                    outcome = f"caught: {red}" if red else "survived"
            finally:
                source.write_text(original)
            self.results[str(mutant)] = outcome
            with self.journal.open("a") as journal:
                journal.write(json.dumps([str(mutant), outcome]) + "\n")
        return self.results[str(mutant)]


def show(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line}\n- {mutant.before.strip()}\n+ {mutant.after.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sample", type=int, help="as many mutants, drawn at random, 0 for a report alone; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--files", default="*", metavar="GLOB", help="paths in csrc/cpu")
    parser.add_argument("--output", type=Path, help="JSON: counts for each file, survivors")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()

    everyone, excluded = all_mutants()
    mutants = [m for m in everyone if fnmatch.fnmatch(m.file, arguments.files)]
    if arguments.sample is not None and arguments.sample < len(mutants):
        mutants = sorted(random.Random(arguments.seed).sample(mutants, arguments.sample))
    if arguments.list:
        return print(*map(show, mutants), sep="\n")

    laboratory = Laboratory()
    if arguments.sample == 0:
        laboratory.results |= dict.fromkeys(laboratory.survivors, "survived")
    else:
        mutants += [m for m in everyone if str(m) in laboratory.survivors and m not in mutants]
        print(f"{len(mutants)} mutants in {laboratory.folder}; {excluded} excluded", flush=True)
        laboratory.start()
    begin = time.perf_counter()
    for k, mutant in enumerate(mutants, 1):
        outcome = laboratory.try_mutant(mutant)
        print(f"{k}/{len(mutants)}, {time.perf_counter() - begin:.0f} s: {outcome:20} {mutant}", flush=True)

    # Earlier runs on the same sources count as well.
    tried = {mutant: laboratory.results[str(mutant)] for mutant in everyone if str(mutant) in laboratory.results}
    outcomes = dict[str, Counter[str]]()
    for mutant, outcome in tried.items():
        outcomes.setdefault(mutant.file, Counter())[outcome.split(":")[0]] += 1
    survivors = [mutant for mutant, outcome in tried.items() if outcome == "survived"]
    total = sum(outcomes.values(), Counter[str]())
    built = total["caught"] + total["survived"]
    print(f"\n{'file':28}{'mutants':>9}{'caught':>9}{'build failures':>16}{'survivors':>11}")
    for file, counts in (*sorted(outcomes.items()), ("total", total)):
        print(f"{file:28}{counts.total():9}{counts['caught']:9}{counts['build failure']:16}{counts['survived']:11}")
    print("", *map(show, survivors), sep="\n")
    print(f"\ncaught: {100.0 * total['caught'] / max(1, built):.1f} % of {built}")
    if arguments.output:
        summary = {
            "files": outcomes,
            "total": total,
            "mutants": len(everyone),
            "excluded": excluded,
            "survivors": [m._asdict() for m in survivors],
        }
        arguments.output.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
