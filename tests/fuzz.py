"""Random calls of every entry against 80-bit truth.

    python tests/fuzz.py --seed 7 --cases 10000 [--only ENTRY] [--start INDEX] [--case INDEX]

A case that is out of budget is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time

import numpy as np
import torch
from fuzz_cases import ENTRIES, Case, draw
from fuzz_expected import Expected
from fuzz_truth import LD, Array
from fuzz_values import PQ, wide
from torch import Tensor

from csdiv import GaussianMixture, testing

counts: collections.Counter[str] = collections.Counter()
"""Numbers that were compared: finite, special, and without a budget."""


def run(case: Case) -> list[str]:
    """What is wrong with csdiv's answers; [] if nothing."""
    torch.set_num_threads(case.threads)
    expected = Expected(case)
    if case.entry == "assign":
        return assigned(case, expected)
    upstream = upstream_of(case, expected)
    value, grads = evaluate(case, upstream)
    faults = []
    if value.dtype != case.dtype or tuple(value.shape) != expected.shape:
        return [f"value: {value.dtype} {tuple(value.shape)} for {case.dtype} {expected.shape}"]
    exact, band = (np.reshape(t, expected.shape) for t in (expected.value, expected.band))
    pending = {"value": (value, exact, band)}
    combined = expected.combined
    if combined is not None and combined.shift is not None:
        pending["value"] = logarithms(value, expected)
    if grads is not None and not spoilt(case, expected):
        for (name, (grad, limit)), found in zip(expected.gradients(wide(upstream)).items(), grads, strict=True):
            if found.dtype != case.leaves[name].dtype or found.shape != case.leaves[name].shape:
                faults.append(f"gradient of {name}: {found.dtype} {tuple(found.shape)}")
            pending[f"gradient of {name}"] = found, grad, limit
    plain = None
    for name, (found, truth, limit) in pending.items():
        if (fault := compare(found, truth, limit, steep=name != "value")) is None:
            continue
        plain = eager(case, upstream) if plain is None else plain
        if name in plain:
            excused = 2 * np.abs(wide(plain[name]).reshape(truth.shape) - truth)
            if compare(found, truth, limit + np.where(np.isfinite(excused), excused, 0), name != "value") is None:
                counts["excused by eager"] += 1
                continue
        faults.append(f"{name}: {fault}")
    return faults


def spoilt(case: Case, expected: Expected) -> bool:
    """Whether a formula of torch, which gives NaN for the upstream gradient 0 of a NaN, has one."""
    composed = expected.full or (expected.combined is not None and case.entry != "cs_divergence")
    if not (composed or case.backend == "reference" or case.entry in ("responsibilities", "channel_log_overlap")):
        return False
    if 0 in expected.shape:
        return True
    values = [term.value for term in getattr(expected, "terms", {}).values()]
    return any((np.isnan(v) | (v == np.inf)).any() for v in values) or not expected.usable(expected.value).all()


def upstream_of(case: Case, expected: Expected) -> Tensor:
    """Zero wherever there is no gradient to compare; −inf of logarithms has one, of zero."""
    rng = np.random.default_rng([case.seed, case.index, 1])
    size = {"ones": np.ones, "zero": np.zeros}.get(case.upstream, rng.standard_normal)(expected.value.shape)
    size = size * (1e-6 if case.upstream == "small" else 1.0)
    usable = expected.usable(expected.value)
    if expected.combined is None and case.entry not in ("pairwise_log_overlap", "cs_regularizer", "renyi2_entropy"):
        usable |= expected.value == -np.inf
    usable &= ~np.isnan(expected.band)
    return torch.as_tensor(np.where(usable, size, 0.0).reshape(expected.shape)).to(case.dtype)


def evaluate(case: Case, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    leaves = {n: t.detach().requires_grad_(n in case.needs) for n, t in case.leaves.items()}
    wanted = [leaves[n] for n in case.needs]

    def function(*tensors: Tensor) -> Tensor:
        return case.call(leaves | dict(zip(case.needs, tensors, strict=True)))

    if not wanted:
        return case.call(leaves), None
    if case.mode == "vjp":
        value, pull = torch.func.vjp(function, *(t.detach() for t in wanted))
        return value, pull(upstream)
    value = torch.vmap(case.call)(leaves) if case.mode == "vmap" else function(*wanted)
    if not value.requires_grad:  # of pairs there are none to weights
        return value, tuple(torch.zeros_like(t) for t in wanted)
    return value.detach(), torch.autograd.grad(value, wanted, upstream, materialize_grads=True, allow_unused=True)


def eager(case: Case, upstream: Tensor) -> dict[str, Tensor]:
    """Plain torch in the same format, whose errors csdiv may make twice; {} where it is no yardstick."""
    names = {"renyi2_entropy": "self_overlap"}
    entry = names.get(case.entry, case.entry)
    full = any(n.endswith(("tril", "factor", "matrix")) for n in case.leaves)
    if entry not in testing.ENTRIES or (full and case.dtype != torch.float64) or case.mode == "vmap":
        return {}
    if any("self_overlap" in n for n in case.leaves):
        return {}
    leaves = {n: t.detach().to(case.dtype).requires_grad_(n in case.needs) for n, t in case.leaves.items()}
    sides = []
    for side in "pq":
        own = {n[2:]: t for n, t in leaves.items() if n[0] == side}
        if not own:
            continue
        means = own.pop("means")
        if "log_variances" in own:
            own["variances"] = own.pop("log_variances").exp()
        if "weights" in own:
            own["log_weights"] = own.pop("weights").log()
        if not any(k in own for k in ("variances", "scale_tril", "factor", "covariance_matrix")):
            own["variances"] = means.new_zeros(1, 1)
        sides.append(GaussianMixture._unchecked(means=means, **own))
    try:
        value = testing.eager(entry, sides[0], sides[-1]).expand(upstream.shape)
        value = -value if case.entry == "renyi2_entropy" else value
        found = {"value": value.detach()}
        if case.needs:
            grads = torch.autograd.grad(
                value, [leaves[n] for n in case.needs], upstream, materialize_grads=True, allow_unused=True
            )
            found |= {f"gradient of {n}": g for n, g in zip(case.needs, grads, strict=True)}
    except torch.linalg.LinAlgError:
        return {}
    return found


def logarithms(value: Tensor, expected: Expected) -> tuple[Tensor, Array, Array]:
    """A logarithm of a difference, whose relative error is not bounded, as the difference that it is of."""
    combined, got = expected.combined, wide(value).reshape(expected.value.shape)
    limit = torch.finfo(value.dtype).max
    with np.errstate(all="ignore"):
        plain = np.isfinite(combined.ratio) & (combined.ratio_band < 0.5) & ~(np.abs(expected.value) > limit)
        plain |= expected.value == -np.inf
        rounding = expected.computed.eps * (1 + np.abs(expected.value)) * (combined.ratio + combined.ratio_band)
        found = np.where(plain, np.exp(got - combined.shift), got)
    band = combined.ratio_band + np.where(np.isfinite(rounding), rounding, 0)
    band = np.where(plain, band, np.where(np.isfinite(band), 0, np.inf))
    exact = np.where(plain, np.maximum(combined.ratio, 0), expected.value)  # −inf below 0
    found, exact, band = (np.reshape(t, expected.shape) for t in (found, exact, band))
    return torch.from_numpy(np.asarray(found, np.float64)), exact, band


def compare(found: Tensor, exact: Array, band: Array, steep: bool = False) -> str | None:
    """The worst element that is out of budget, if any. Infinities and NaNs are those of the truth; from a quarter of
    the largest number on, where squares overflow, there may be an infinity. ``steep``: a gradient, which is anything
    where the sum of its terms' sizes, band / 4 ε at most, leaves the format."""
    info = torch.finfo(found.dtype)
    got = wide(found)
    with np.errstate(all="ignore"):
        special = ~np.isfinite(exact) | (np.abs(exact) > LD(info.max) * (1 + LD(info.eps) / 4))
        rounded = np.where(np.abs(exact) > info.max, np.sign(exact) * np.inf, exact)
        near_end = (np.abs(exact) + band > 0.25 * info.max) & ~np.isnan(exact)
        smallest = info.tiny * (info.eps if found.dtype == torch.float16 else 1.0)  # float16 is rounded, not flushed
        allowed = band + (0.5 * info.eps) * np.abs(exact) + smallest
        right = np.where(special, (got == rounded) | (np.isnan(got) & np.isnan(exact)), np.abs(got - exact) <= allowed)
        right |= near_end & ((got == np.sign(exact) * np.inf) | (np.abs(got - exact) <= allowed))
        unknown = np.isnan(band) | ((band == np.inf) & ~special)
        if steep:
            unknown |= np.abs(exact) + band / (4 * info.eps) > 0.25 * info.max
        right |= unknown
    counts["special"] += int(special.sum())
    counts["without a budget"] += int((unknown & ~special).sum())
    counts["finite"] += int((~special & ~unknown).sum())
    if right.all():
        return None
    with np.errstate(all="ignore"):
        excess = np.where(right, -1, np.nan_to_num(np.abs(got - exact) / allowed, nan=np.inf))
    at = np.unravel_index(int(excess.argmax()), excess.shape)
    return (
        f"{int((~right).sum())} of {right.size}, at {tuple(map(int, at))}: "
        f"{float(got[at]):.9g} for {float(exact[at]):.9g}, "
        f"error {float(abs(got[at] - exact[at])):.3g}, allowed {float(allowed[at]):.3g}"
    )


def assigned(case: Case, expected: Expected) -> list[str]:
    """Each index is one of the largest share, as far as the budget can tell."""
    found = torch.vmap(case.call)(case.leaves) if case.mode == "vmap" else case.call(case.leaves)
    shape = expected.shape[:-1]
    if found.dtype != torch.int64 or tuple(found.shape) != shape:
        return [f"index: {found.dtype} {tuple(found.shape)}"]
    term = expected.terms[PQ]
    index = found.numpy().reshape(term.value.shape)
    if index.size == 0:
        return []
    if index.min() < 0 or index.max() >= term.shares.shape[-1]:
        return [f"index: {index.min()} to {index.max()}"]
    with np.errstate(all="ignore"):
        most, least = term.shares + term.errors, term.shares - term.errors
        chosen = np.take_along_axis(most, index[..., None], -1)[..., 0]
        wrong = np.isfinite(term.value) & ~expected.outside[..., 0] & ~(chosen >= least.max(-1))
    counts["finite"] += int(np.isfinite(term.value).sum())
    return [f"index: {int(wrong.sum())} of {wrong.size}, first {np.argwhere(wrong)[0].tolist()}"] if wrong.any() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", choices=ENTRIES)
    parser.add_argument("--case", type=int, help="run this one and print it")
    options = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(True)  # unwritten memory is NaN
    first, count = (options.start, options.cases) if options.case is None else (options.case, 1)
    return sweep(options.seed, range(first, first + count), options.only, verbose=options.case is not None)


def sweep(seed: int, indices: range, only: str | None = None, verbose: bool = False) -> int:
    """Runs the cases, prints what is wrong, and gives the number of wrong cases."""
    wrong, start = 0, time.monotonic()
    counts.clear()
    for done, index in enumerate(indices, 1):
        case = draw(seed, index, only)
        if verbose:
            print(case)
        try:
            faults = run(case)
        except Exception as error:
            faults = [f"{type(error).__name__}: {error}"]
            if verbose:
                raise
        if faults:
            wrong += 1
            extra = f" --only {only.replace(' ', chr(92) + ' ')}" if only else ""
            print(f"python tests/fuzz.py --seed {seed} --case {index}{extra}\n  {case}")
            print("".join(f"    {fault}\n" for fault in faults), end="", flush=True)
        if done % 1000 == 0 or done == len(indices):
            compared = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
            print(f"{done} cases, {wrong} wrong, {time.monotonic() - start:.0f} s; {compared}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
