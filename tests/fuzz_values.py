"""The value that a case of the fuzzer must give, and how far it may be off."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from fuzz_cases import FORMS, SELF, Case
from fuzz_truth import LD, LOG_2PI, Array, Pairs, Side, Term, pairs_of, reduced
from torch import Tensor

EPS64 = 2.0**-52
LOG_2 = np.log(LD(2))
EVENT_DIMS = {"means": 2, "variances": 2, "log_variances": 2, "channels": 2, "weights": 1, "log_weights": 1}
EVENT_DIMS |= dict.fromkeys(FORMS, 3)
PQ, PP, QQ = (0, 1), (0, 0), (1, 1)


def wide(t: Tensor) -> Array:
    """80 bits of a tensor of any format."""
    return t.detach().to(torch.float64).numpy().astype(LD)


class Combined(NamedTuple):
    """A function of log V(p, q), log V(p, p) and log V(q, q): value, budget, slopes and what these may be off."""

    value: Array
    band: Array
    slopes: list[Array]
    errors: list[Array]
    shift: Array | None = None  # of logarithms: values are compared as exp(value − shift) with ...
    ratio: Array | None = None  # ... this number, and ...
    ratio_band: Array | None = None  # ... this budget


class Values:
    """The value of a case, (B, ...) with its batch flattened, its terms, and how far it may be off."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.batch = np.broadcast_shapes(*(self._batch_of(n, t) for n, t in case.leaves.items()))
        self.count = math.prod(self.batch)
        self.full = any(n[2:] in FORMS for n in case.leaves)
        self.computed = torch.finfo(case.dtype)
        self.tiny = float(self.computed.tiny)
        if case.entry == "channel_log_overlap":
            self.tiny = max(self.tiny, 1e-200)  # below, sums of (19) need not be taken anew
        # Responsibilities round logits with the constant that they have in common.
        self.scaled = case.backend != "reference" and case.entry != "responsibilities"
        self.sides = [self._side("p"), self._side("q")]
        self.extra = np.zeros(self.count, LD)
        if "bandwidth" in case.leaves:
            self.extra = self._flat(case.leaves["bandwidth"], 0) ** 2
        with np.errstate(all="ignore"):
            self._evaluate()

    def _event(self, name: str) -> int:
        return EVENT_DIMS.get(name[2:], 0)

    def _batch_of(self, name: str, t: Tensor) -> tuple[int, ...]:
        return tuple(t.shape[: t.ndim - self._event(name)])

    def _flat(self, t: Tensor, event: int) -> Array:
        shape = t.shape[t.ndim - event :]
        return np.broadcast_to(wide(t), (*self.batch, *shape)).reshape(self.count, *shape)

    def _leaf(self, name: str) -> Array | None:
        t = self.case.leaves.get(name)
        return None if t is None else self._flat(t, self._event(name))

    def _side(self, name: str) -> Side | None:
        means = self._leaf(f"{name}_means")
        if means is None:
            return None
        logs = self._leaf(f"{name}_log_weights")
        linear = self._leaf(f"{name}_weights")
        with np.errstate(all="ignore"):
            if linear is not None:
                logs = np.log(linear)
            if logs is None:
                logs = np.full(means.shape[:2], -np.log(LD(max(1, means.shape[1]))))
            if (variances := self._leaf(f"{name}_log_variances")) is not None:
                variances = np.exp(variances)
            elif (variances := self._leaf(f"{name}_variances")) is not None:
                variances = np.where(variances < 0, np.nan, variances)
        factor, covariance = self._leaf(f"{name}_factor"), self._leaf(f"{name}_covariance_matrix")
        if (tril := self._leaf(f"{name}_scale_tril")) is not None:
            factor = np.tril(tril)
        points = variances is None and factor is None and covariance is None
        spherical = points or (variances is not None and variances.shape[-1] == 1)
        if points:
            variances = np.zeros((self.count, 1, 1), LD)
        if variances is not None:
            variances = np.broadcast_to(variances, (*variances.shape[:2], means.shape[-1]))
        rounded = f"{name}_log_weights" not in self.case.leaves
        own = self._batch_of(f"{name}_means", self.case.leaves[f"{name}_means"])
        multiplied = self.case.entry == "channel_log_overlap" or own != self.batch
        return Side(
            means, logs, variances, factor, covariance, points, spherical, linear is not None, rounded, multiplied
        )

    def _unit(self, sides: tuple[int, int]) -> float:
        """4 ε of the format in which a pair of sides is computed."""
        any_full = any(self.sides[k].full for k in sides)
        all_wide = self.full and self.case.entry == "cs_divergence"
        rounded_before = self.case.entry.endswith("mmd2") or self.case.entry in ("cs_regularizer", "responsibilities")
        return 4.0 * (EPS64 if (any_full or all_wide) and not rounded_before else self.computed.eps)

    def _weight_unit(self, sides: tuple[int, int]) -> float:
        formats = [torch.finfo(self.case.dtypes[k]).eps for k in sides if self.sides[k].rounded]
        return 4.0 * min(max(formats, default=0.0), torch.finfo(torch.float32).eps)

    def _pairs(self, sides: tuple[int, int]) -> Pairs:
        plain = not self.scaled or self.computed.bits == 64
        p, q = (self.sides[k] for k in sides)
        if self.case.entry == "pairwise_log_overlap":  # weights are not used
            p, q = (side._replace(log_weights=np.zeros_like(side.log_weights)) for side in (p, q))
        return pairs_of(p, q, self.extra, self.scaled, plain)

    def _term(self, sides: tuple[int, int], over: int = 2) -> Term:
        p, q = (self.sides[k] for k in sides)
        weights = (p.log_weights if over == 2 else None, q.log_weights if over else None)
        return reduced(self._pairs(sides), *weights, self._unit(sides), self._weight_unit(sides))

    def _evaluate(self) -> None:
        entry, unit = self.case.entry, 4.0 * self.computed.eps
        self.combined: Combined | None = None
        if entry in SELF:
            self.terms = {PP: self._term(PP)}
            sign = 1 if entry == "self_overlap" else -1
            self.value, self.band = sign * self.terms[PP].value, self.terms[PP].band
        elif entry in ("log_overlap", "component_log_overlap", "log_prob", "pairwise_log_overlap"):
            term = self._term(PQ, {"log_overlap": 2, "pairwise_log_overlap": 0}.get(entry, 1))
            self.terms, self.value, self.band = {PQ: term}, term.value, term.band
        elif entry in ("responsibilities", "assign"):
            term = self._term(PQ, 1)
            bad = ~np.isfinite(term.value)[..., None]
            self.outside = np.broadcast_to(np.abs(term.value)[..., None] > 0.25 * self.computed.max, term.shares.shape)
            self.terms, self.value = {PQ: term}, np.where(bad, np.nan, term.shares)
            self.band = np.where(self.outside, np.inf, term.errors + 2 * unit * term.shares)
        elif entry == "channel_log_overlap":
            self._evaluate_channels()
        elif entry == "cs_regularizer":
            self._evaluate_regularizer()
        else:
            self.terms = {sides: self._known(sides) or self._term(sides) for sides in (PQ, PP, QQ)}
            self.combined = self._combine()
            self.value, self.band = self.combined.value, self.combined.band
        self.shape = (*self.batch, *self.value.shape[1:])

    def _known(self, sides: tuple[int, int]) -> Term | None:
        """A self term that was given."""
        if sides == PQ or (given := self._leaf("pq"[sides[0]] + "_self_overlap")) is None:
            return None
        nothing = np.zeros((self.count, 1, 1), LD)
        zero = np.zeros_like(given)
        return Term(given, nothing, nothing, zero + 4 * EPS64 * (1 + np.abs(given)), zero, None)

    def _evaluate_channels(self) -> None:
        a, b = self._leaf("p_channels"), self._leaf("q_channels")
        pairs = self._pairs(PQ)
        options = pairs, self._unit(PQ), self._weight_unit(PQ)
        self.channels = [
            [reduced(options[0], a[:, c], b[:, e], *options[1:]) for e in range(b.shape[1])] for c in range(a.shape[1])
        ]
        self.value = np.stack([np.stack([t.value for t in row], -1) for row in self.channels], 1)
        self.band = np.stack([np.stack([t.band for t in row], -1) for row in self.channels], 1)

    def _evaluate_regularizer(self) -> None:
        rows, own = self._term(PQ, 1), self._known(QQ) or self._term(QQ)
        logs = self._leaf("p_log_variances")
        self.terms = {PQ: rows, QQ: own}
        code = -0.5 * (logs + LOG_2PI + LOG_2).sum(-1)
        self.value = 0.5 * (code + own.value[:, None]) - rows.value
        self.band = np.maximum(rows.band, own.band[:, None])

    def _combine(self) -> Combined:
        entry = self.case.entry
        (pq, pp, qq), (b_pq, b_pp, b_qq) = zip(*((t.value, t.band) for t in self.terms.values()), strict=True)
        if entry in ("cs_divergence", "cosine_similarity"):
            d = 0.5 * (pp + qq) - pq
            b = np.maximum(np.maximum(b_pp, b_qq), b_pq)
            slopes = [np.full_like(d, s) for s in (-1, 0.5, 0.5)]
            if entry == "cs_divergence":
                return Combined(d, b, slopes, [np.zeros_like(d)] * 3)
            value = np.exp(-d)
            relative = np.expm1(b) + 2 * self.computed.eps * (1 + np.abs(d))
            return Combined(
                value, value * relative, [-value * s for s in slopes], [np.abs(value * s) * relative for s in slopes]
            )
        scale = np.maximum(pp, qq)
        scale = np.where(np.isfinite(scale), scale, 0)
        v = [np.exp(x - scale) for x in (pq, pp, qq)]
        off = [
            np.where(x > 0, np.expm1(b) + 4 * EPS64 * (1 + np.abs(log) + np.abs(scale)), 0)
            for x, b, log in zip(v, (b_pq, b_pp, b_qq), (pq, pp, qq), strict=True)
        ]
        ise = (v[1] - v[0]) + (v[2] - v[0])
        band = v[1] * off[1] + v[2] * off[2] + 2 * v[0] * off[0]
        slopes = [-2 * v[0], v[1], v[2]]
        if entry == "nise":
            total = v[1] + v[2]
            slopes = [-2 * v[0] / total, 2 * v[0] * v[1] / total**2, 2 * v[0] * v[2] / total**2]
            errors = [np.abs(s) * sum(off) + 8 * EPS64 * x / total for s, x in zip(slopes, v, strict=True)]
            return Combined(ise / total, 2 * band / total, slopes, errors)
        if entry.endswith("mmd2"):
            scale = scale + 0.5 * self.case.dim * (LOG_2PI + np.log(self.extra))
            relative = 4 * self.computed.eps * (1 + self.case.dim)
        else:
            relative = 4 * EPS64
        if not entry.startswith("log "):
            unit = np.exp(scale)
            relative = relative + 4 * EPS64 * np.abs(scale)
            errors = [unit * np.abs(s) * (o + relative) for s, o in zip(slopes, off, strict=True)]
            value = np.where(np.isnan(ise) | (ise != 0), unit * ise, 0)
            return Combined(value, unit * (band + relative * np.abs(ise)), [unit * s for s in slopes], errors)
        positive = ise > 0
        value = np.where(np.isnan(ise), np.nan, np.where(positive, np.log(np.where(positive, ise, 1)) + scale, -np.inf))
        certain = positive & (band < 0.1 * ise)
        by = np.where(certain, ise, np.inf)
        slopes = [s / by for s in slopes]
        errors = [np.abs(s) * (2 * o + 2 * band / by) for s, o in zip(slopes, off, strict=True)]
        band = band + 2 * (relative + EPS64 * np.abs(scale)) * ise
        return Combined(value, np.zeros_like(value), slopes, errors, scale, ise, band)
