"""What a case of the fuzzer must give: its value, its gradients for an upstream one, and how far both may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from fuzz_cases import FORMS, OF_POINTS, SELF, Case
from fuzz_truth import LD, LOG_2PI, Array, Pairs, Side, Sums, Term, pairs_of, reduced
from torch import Tensor

EPS64 = 2.0**-52
LOG_2 = np.log(LD(2))
PQ, PP, QQ = (0, 1), (0, 0), (1, 1)


def unit_of(term: Term) -> Array:
    """The relative errors of the shares, 0 where there is none."""
    return np.where(term.shares > 0, term.errors / np.where(term.shares > 0, term.shares, 1), 0)


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


@dataclass
class Expected:
    case: Case

    def __post_init__(self) -> None:
        case = self.case
        self.batch = np.broadcast_shapes(*(self._batch_of(n, t) for n, t in case.leaves.items()))
        self.count = math.prod(self.batch)
        self.full = any(n[2:] in FORMS for n in case.leaves)
        self.computed = torch.finfo(case.dtype)
        self.tiny = float(self.computed.tiny)
        self.scaled = case.backend != "reference"
        self.sides = [self._side("p"), self._side("q")]
        self.extra = np.zeros(self.count, LD)
        if "bandwidth" in case.leaves:
            self.extra = self._flat(case.leaves["bandwidth"], 0) ** 2
        with np.errstate(all="ignore"):
            self._evaluate()

    # tensors and back

    EVENT = {"means": 2, "variances": 2, "log_variances": 2, "channels": 2, "weights": 1, "log_weights": 1} | dict.fromkeys(
        FORMS, 3
    )

    def _event(self, name: str) -> int:
        return self.EVENT.get(name[2:], 0)

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
        return Side(means, logs, variances, factor, covariance, points, spherical, linear is not None, rounded)

    # values

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
        return pairs_of(self.sides[sides[0]], self.sides[sides[1]], self.extra, self.scaled, plain)

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
        off = [np.expm1(b) + 4 * EPS64 * (1 + np.abs(x) + np.abs(scale)) for b, x in ((b_pq, pq), (b_pp, pp), (b_qq, qq))]
        off = [np.where(x > 0, o, 0) for x, o in zip(v, off, strict=True)]
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

    # gradients

    def usable(self, value: Array) -> Array:
        """Of which elements of the result gradients are compared: others get an upstream gradient of zero."""
        usable = np.isfinite(value) & (np.abs(value) < 0.25 * self.computed.max)
        if self.case.entry == "responsibilities":
            usable &= ~self.outside
        if self.combined is not None:
            if self.combined.shift is not None:
                with np.errstate(all="ignore"):
                    usable &= self.combined.ratio_band < 0.1 * self.combined.ratio
            for slope in self.combined.slopes:
                usable &= np.isfinite(slope)
        return usable

    def gradients(self, upstream: Array) -> dict[str, tuple[Array, Array]]:
        """The gradient of Σ upstream · result and its budget for each tensor that wants one."""
        g = upstream.reshape(self.value.shape)
        full = tuple(side is not None and side.full for side in self.sides)
        self.sums, self.direct = Sums(full, tuple(torch.finfo(t).eps for t in self.case.dtypes)), {}
        with np.errstate(all="ignore"):
            self._pull_all(g)
            return {name: self._of_leaf(name) for name in self.case.needs}

    def _pull_all(self, g: Array) -> None:
        entry = self.case.entry
        if entry in SELF:
            self._pull(PP, g if entry == "self_overlap" else -g)
        elif entry == "pairwise_log_overlap":
            self._pull(PQ, g)
        elif entry == "responsibilities":
            shares = self.terms[PQ].shares
            mean = (g * shares).sum(-1, keepdims=True)
            size = np.abs(g) + (np.abs(g) * shares).sum(-1, keepdims=True)
            self._pull(PQ, g - mean, size * unit_of(self.terms[PQ]))
        elif entry == "channel_log_overlap":
            for c, row in enumerate(self.channels):
                for e, term in enumerate(row):
                    self._pull_term(term, PQ, g[:, c, e], channel=(c, e))
        elif entry == "cs_regularizer":
            self._pull(PQ, -g)
            self._pull(QQ, 0.5 * g.sum(-1), extra=0.5 * np.abs(g).sum(-1) * 8 * self.computed.eps)
            self._of_cap(g)
            self.direct["p_log_variances"] = -0.25 * g[..., None], self.computed.eps * np.abs(g)[..., None]
        elif self.combined is not None:
            for sides, slope, error in zip(self.terms, self.combined.slopes, self.combined.errors, strict=True):
                self._pull(sides, np.where(g == 0, 0, g * slope), np.where(g == 0, 0, np.abs(g) * error))
            if entry.endswith("mmd2"):
                total = -sum(s for s in self.combined.slopes) * 0 + (self.combined.slopes[1] + self.combined.slopes[2])
                total = total + self.combined.slopes[0]
                slope = self.case.dim / np.sqrt(self.extra)
                of = np.where(g == 0, 0, g * total)
                off = np.where(g == 0, 0, np.abs(g) * sum(self.combined.errors))
                self.direct["bandwidth"] = of * slope, off * slope
        else:
            self._pull(PQ, g)

    def _of_cap(self, g: Array) -> None:
        """Equation (10) puts e^U, the cap, for larger variances of codes: δ/s is off by δ e^−U."""
        cap = np.exp(LD(-85 if self.computed.bits == 32 else -700))
        p, q = self.sides
        delta = np.where(p.variances * cap > 1, 1, 0)[:, :, None] * np.abs(p.means[:, :, None] - q.means[:, None]) * cap
        size = np.where(self.terms[PQ].shares > 0, np.abs(g)[..., None], 0)[..., None] * delta
        size = np.where(np.isnan(size), 0, size)
        for side, axis in ((0, 2), (1, 1)):
            self.sums.add(side, "means", np.zeros_like(size.sum(axis)), size.sum(axis))

    def _pull(self, sides: tuple[int, int], slope: Array, extra: Array | None = None) -> None:
        term = self.terms[sides]
        if term.pairs is None:
            self.direct["pq"[sides[0]] + "_self_overlap"] = slope, np.zeros_like(slope) if extra is None else extra
        else:
            self._pull_term(term, sides, slope, extra)

    def _pull_term(
        self,
        term: Term,
        sides: tuple[int, int],
        slope: Array,
        extra: Array | None = None,
        channel: tuple[int, int] | None = None,
    ) -> None:
        lift = (slice(None),) * slope.ndim + (None,) * (3 - slope.ndim)
        slope = slope[lift]
        extra = np.zeros_like(slope) if extra is None else extra[(..., *lift[extra.ndim :])]
        if extra.ndim < 3:
            extra = extra[(...,) + (None,) * (3 - extra.ndim)]
        grad = self.sums.pull(term, slope, extra, sides, self.tiny)
        size = np.abs(slope) * np.ones_like(grad)
        band = size * term.errors + term.shares * extra + 2 * self.tiny * np.maximum(size, 1)
        for place, (side, axis) in enumerate(((sides[0], 2), (sides[1], 1))):
            name = "weights" if channel is None else f"channel {channel[place]}"
            summed_over = {"log_overlap": 2, "channel_log_overlap": 2}.get(self.case.entry, 2 if sides != PQ else 1)
            if self.combined is not None:
                summed_over = 2
            if place == 0 and summed_over < 2:
                continue
            if self.case.entry == "pairwise_log_overlap":
                continue
            if self.sides[side].linear and channel is None:
                self.sums.add(side, name, *self._of_linear(term, sides, place, slope, extra))
            else:
                self.sums.add(side, name, grad.sum(axis), band.sum(axis))

    def _of_linear(
        self, term: Term, sides: tuple[int, int], place: int, slope: Array, extra: Array
    ) -> tuple[Array, Array]:
        """Derivatives with respect to weights themselves: Σ g r / w, which has a limit where w is zero."""
        own, other = self.sides[sides[place]], self.sides[sides[1 - place]]
        logs = other.log_weights[:, None] if place == 0 else other.log_weights[:, :, None]
        both = place == 0 or self.case.entry in ("log_overlap", *SELF) or self.combined is not None or sides != PQ
        value = term.value.reshape(term.value.shape + (1,) * (3 - term.value.ndim))
        x = term.pairs.logits - value
        if both:
            x = np.where(logs == -np.inf, -np.inf, x + logs)
        shares = np.where(np.isfinite(value), np.exp(x), 0)
        usable = np.isfinite(own.means).all(-1)
        for t in (own.variances, own.factor, own.covariance):
            if t is not None:
                usable = usable & np.isfinite(t).all(tuple(range(2, t.ndim)))
        usable = usable | own.counts
        usable = usable[:, :, None] if place == 0 else usable[:, None]
        shares = np.where(usable & (slope != 0), shares, 0)
        if self.case.entry == "responsibilities":
            grad = np.where(term.shares > 0, slope * shares, 0)
        else:
            grad = np.where(shares == 0, 0, slope * shares)
        unit = self._unit(sides) + self._weight_unit(sides)
        sizes = term.sizes.reshape(value.shape)
        errors = np.where(np.isfinite(term.pairs.sizes), unit * (1 + term.pairs.sizes + np.abs(x) + sizes), 0)
        errors = np.expm1(errors + unit_of(term)) + 4 * self.computed.eps
        band = shares * (np.abs(slope) * errors + extra)
        weights = np.expand_dims(np.exp(own.log_weights), axis := 2 - place)
        band = band + np.where(weights > 0, 2 * self.tiny * np.maximum(np.abs(slope), 1) / weights, 0)
        return grad.sum(axis), np.where(np.isnan(band), np.inf, band).sum(axis)

    def _of_leaf(self, name: str) -> tuple[Array, Array]:
        leaf = self.case.leaves[name]
        zero = np.zeros((self.count, *leaf.shape[leaf.ndim - self._event(name) :]), LD)
        grad, band = zero, zero
        if name[1] == "_" and name[2:] not in ("self_overlap",):
            grad, band = self._of_parameter(name, "pq".index(name[0]), zero)
        elif name == "bandwidth":
            spreads = [self.sums.found.get((side, "spread")) for side in (0, 1)]
            for found in spreads:
                if found is not None:
                    traces = [np.trace(t, axis1=-2, axis2=-1) if t.ndim == 4 else t.sum(-1) for t in found]
                    grad, band = grad + traces[0].sum(-1), band + traces[1].sum(-1)
            root = np.sqrt(self.extra)
            grad, band = grad * root, band * root
        if name in self.direct:
            own = self.direct[name]
            grad, band = grad + own[0], band + own[1]
        return self._summed(grad, leaf), self._summed(band, leaf)

    def _of_parameter(self, name: str, side: int, zero: Array) -> tuple[Array, Array]:
        kind, found = name[2:], self.sums.found
        if kind == "channels":
            count = zero.shape[1]
            both = [found.get((side, f"channel {c}"), [zero[:, 0], zero[:, 0]]) for c in range(count)]
            return np.stack([b[0] for b in both], 1), np.stack([b[1] for b in both], 1)
        key = {"means": "means", "weights": "weights", "log_weights": "weights"}.get(kind, "spread")
        if (side, key) not in found:
            return zero, zero
        grad, band = found[side, key]
        if key != "spread":
            return grad, band
        own = self.sides[side]
        if kind.endswith("variances"):
            if kind == "log_variances":
                grad, band = grad * own.variances, band * own.variances
            return grad, band
        if kind == "covariance_matrix":
            return grad, band
        grad, band = 2 * grad @ own.factor, 2 * band @ np.abs(own.factor)
        return (np.tril(grad), np.tril(band)) if kind == "scale_tril" else (grad, band)

    def _summed(self, full: Array, leaf: Tensor) -> Array:
        """Sums over what the leaf is shared by."""
        full = np.reshape(full, (*self.batch, *full.shape[1:]))
        shape = tuple(leaf.shape)
        lead = full.ndim - len(shape)
        full = full.sum(tuple(range(lead))) if lead else full
        axes = tuple(k for k in range(len(shape)) if shape[k] == 1 and full.shape[k] != 1)
        return full.sum(axes, keepdims=True) if axes else full


__all__ = ["OF_POINTS", "Expected", "wide"]
