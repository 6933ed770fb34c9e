"""``python -m bench``: csdiv beside its peers, on the CPU (cpu, scaling) and on a GPU (gpu), beside what the CPU could
do (limits), beside float64 (accuracy), inside an autoencoder (step, epochs, swap-in), beside another build of itself
(ab); how many instructions a call takes (instructions); which tiles suit the Triton kernels on a GPU (tune); what the
kernels for GPUs are made of (static), which needs none. Results are JSON files: ``compare`` sets two side by side,
``report`` writes docs/benchmarks.md from those that are committed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import ab, accuracy, compare, instructions, limits, measure, scaling, static, static_triton, step
from .cases import CPU_CASES, Case
from .measure import run_case
from .peers import installed, providers
from .timing import machine

Records = list[dict[str, object]]
Found = tuple[Records, dict[str, Any]]
"""The records of a suite, and what else its file has."""


def write(path: Path | None, info: dict[str, str], records: Records, **more: object) -> None:
    """The results as JSON, with the date and the machine."""
    if path is None:
        return
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": date, "machine": info, "records": records, **more}, indent=1) + "\n")


def _cases(options: argparse.Namespace) -> list[Case]:
    return [case for case in CPU_CASES if not options.cases or case.name in options.cases]


def _cpu(options: argparse.Namespace, info: dict[str, str]) -> Found:
    records: Records = []
    for case in _cases(options):
        records += run_case(case, providers(case), options.rounds)
        write(options.output, info, _with_earlier(options, records))  # of a run that is stopped there is that much
    print(measure.markdown(records))
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    return _with_earlier(options, records), {}


def _with_earlier(options: argparse.Namespace, records: Records) -> Records:
    """The records in the order of the cases, with those of the other cases that the file to write has already."""
    if not options.cases or options.output is None or not options.output.exists():
        return records
    new = {r["case"] for r in records}
    records = records + [r for r in json.loads(options.output.read_text())["records"] if r["case"] not in new]
    order = [case.name for case in CPU_CASES]
    return sorted(records, key=lambda r: order.index(str(r["case"])))


def _gpu(options: argparse.Namespace, info: dict[str, str]) -> Found:
    from . import gpu  # imports what a CPU machine may lack

    records: Records = []
    device = gpu.STAND_IN if options.dry_run else gpu.current()
    info |= gpu.device_info(device)
    kernels = gpu.kernels_of(device)
    if not installed("pykeops"):
        print("skipped: KeOps, which is not installed")
    more: dict[str, Any] = {"dry_run": options.dry_run}
    for case in gpu.cases(options.cases, device):
        found = gpu.run(
            case,
            device,
            info["name"],
            options.rounds,
            kernels,
            alone=options.alone or (options.dry_run and bool(records)),
        )
        records += found
        write(options.output, info, records, **more)
        print(gpu.markdown(found), flush=True)
    if not options.alone:
        more["full_covariances"] = gpu.full_covariances(device)
        print(*more["full_covariances"], sep="\n")
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    return records, more


def _limits(options: argparse.Namespace, info: dict[str, str]) -> Found:
    cases = _cases(options)
    records = limits.run_bounds(cases, options.rounds)
    more = {
        "instruction_sets": limits.run_instruction_sets(cases[: limits.PLAIN_CASES], options.rounds),
        "divergences": limits.run_divergences(options.rounds),
        "shared": limits.run_shared(options.rounds),
    }
    print(limits.tables(records, **more))
    return records, more


def _tune(options: argparse.Namespace, info: dict[str, str]) -> Found:
    from . import tune

    records, entry = tune.run(options.rounds)
    print(tune.markdown(records), entry, sep="\n\n")
    return records, {"entry": entry}


def _static(options: argparse.Namespace, info: dict[str, str]) -> Found:
    if options.predict:
        return _predict()
    records: Records = []
    for read in (static.read, static_triton.read):
        try:
            records += static.records(read())
        except (ImportError, FileNotFoundError, RuntimeError) as missing:
            print(f"left out: {missing}")
    print(static.markdown(records))
    return records, {"triton": metadata.version("triton")} if util.find_spec("triton") else {}


def _predict() -> Found:
    from . import predict  # imports tests, which only a checkout has

    records = predict.run()
    print(predict.__doc__, predict.gpus(), predict.markdown(records, predict.measured()), sep="\n")
    print(predict.targets(records))
    predict.write_page(records)
    return records, {}


def _scaling(options: argparse.Namespace, info: dict[str, str]) -> Found:
    records: Records = []
    more = {"memory": [scaling.memory()]}
    print(more["memory"])
    for found in scaling.run(options.rounds):
        print(measure.markdown(found), flush=True)
        records += found
        write(options.output, info, records, **more)
    return records, more


def _accuracy(options: argparse.Namespace, info: dict[str, str]) -> Found:
    records = accuracy.run()
    tables = accuracy.markdown(records, info)
    print(tables)
    if options.markdown:
        options.markdown.write_text(tables)
    return records, {}


def _epochs(options: argparse.Namespace, info: dict[str, str]) -> Found:
    from . import epochs  # needs the extra "train"

    records = epochs.run(options.data or "digits", options.rounds)
    print(epochs.markdown(records))
    return records, {}


def _swap_in(options: argparse.Namespace, info: dict[str, str]) -> Found:
    from . import swap_in  # needs the extra "train"

    records, curves = swap_in.run(options.data or "digits", options.rounds)
    print(swap_in.markdown(records, curves))
    return records, {"curves": curves}


def _step(options: argparse.Namespace, info: dict[str, str]) -> Found:
    records = step.run(options.rounds)
    print(step.markdown(records))
    return records, {}


def _instructions(options: argparse.Namespace, info: dict[str, str]) -> Found:
    records = instructions.run()
    print(instructions.markdown(records))
    return records, {}


def _ab(options: argparse.Namespace, info: dict[str, str]) -> Found:
    info["threads"] = str(options.threads or info["threads"])
    records = ab.run(options.files, options.cases, options.rounds, options.threads)
    print(ab.markdown(records))
    return records, {}


SUITES: dict[str, Callable[[argparse.Namespace, dict[str, str]], Found]] = {
    "cpu": _cpu,
    "limits": _limits,
    "gpu": _gpu,
    "tune": _tune,
    "static": _static,
    "scaling": _scaling,
    "accuracy": _accuracy,
    "epochs": _epochs,
    "swap-in": _swap_in,
    "step": _step,
    "instructions": _instructions,
    "ab": _ab,
}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="csdiv bench", description=__doc__)
    parser.add_argument("suite", choices=(*SUITES, "compare", "report"))
    parser.add_argument(
        "files", nargs="*", type=Path, help="compare: two JSON files, of before and of after; ab: one or two checkouts"
    )
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="cpu, gpu, limits, ab: only these cases")
    parser.add_argument("--rounds", type=int, help="how often each call is timed where calls take turns: 7, ab: 100")
    parser.add_argument("--threads", type=int, help="ab: threads of each build, by default those of torch")
    parser.add_argument(
        "--predict", action="store_true", help="static: the time that calls should take on GPUs, into docs/kernels.md"
    )
    parser.add_argument("--alone", action="store_true", help='gpu: the backend "cuda" without its peers')
    parser.add_argument("--dry-run", action="store_true", help="gpu: a rehearsal on tests/stand_in.py")
    parser.add_argument("--data", help="epochs, swap-in: a folder with MNIST's IDX files, or what csdiv train takes")
    parser.add_argument("--markdown", type=Path, help="accuracy: file to write the tables to")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; cpu with --cases: other cases that it has are kept"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (ab.ROUNDS if options.suite == "ab" else 7)
    if options.suite == "ab" and len(options.files) not in (1, 2):
        parser.error("ab: one checkout expected, to compare this one with, or two")
    if options.suite == "compare" and len(options.files) != 2:
        parser.error("compare: two JSON files expected")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.suite == "compare":
        return print(compare.markdown(*options.files))
    if options.suite == "report":
        from . import report  # needs the extra "train"

        return report.write()
    info = machine()
    records, more = SUITES[options.suite](options, info)
    write(options.output, info, records, **more)


if __name__ == "__main__":
    main()
