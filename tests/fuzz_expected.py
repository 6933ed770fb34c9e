"""The gradients that a case of the fuzzer must give, and how far they may be off."""

from __future__ import annotations

import numpy as np
import torch
from fuzz_cases import SELF
from fuzz_truth import LD, Array, Sums, Term
from fuzz_values import PP, PQ, QQ, Values
from torch import Tensor


class Expected(Values):
    """What a case must give."""

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
            self._pull(PQ, g - mean, size * self.terms[PQ].relative)
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
                total = sum(self.combined.slopes)
                slope = self.case.dim / np.sqrt(self.extra)
                of = np.where(g == 0, 0, g * total)
                off = np.where(g == 0, 0, np.abs(g) * sum(self.combined.errors))
                self.direct["bandwidth"] = of * slope, off * slope
        else:
            self._pull(PQ, g)

    def _of_cap(self, g: Array) -> None:
        """Equation (10) puts e^U, the cap, for larger variances s of codes: 1/s is off by e^−U."""
        off = np.exp(LD(-85 if self.computed.bits == 32 else -700))
        p, q = self.sides
        delta = np.abs(p.means[:, :, None] - q.means[:, None])
        if q.full:
            delta = np.broadcast_to(delta.sum(-1, keepdims=True), delta.shape)
        size = np.where(self.terms[PQ].shares > 0, 4 * np.abs(g)[..., None], 0)[..., None]
        size = size * ((p.variances * off > 1) * off).astype(LD)[:, :, None]
        for side, axis in ((0, 2), (1, 1)):
            for name, band in (("means", size * delta), ("spread", size * (1 + off * delta * delta))):
                band = np.where(np.isnan(band), 0, band).sum(axis)
                if name == "spread" and self.sides[side].full:
                    band = band[..., None] * np.ones(band.shape[-1])
                self.sums.add(side, name, np.zeros_like(band), band)

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
        slope = _lifted(slope)
        extra = np.zeros_like(slope) if extra is None else _lifted(extra)
        grad, band = self.sums.pull(term, slope, extra, sides, self.tiny)
        for place, (side, axis) in enumerate(((sides[0], 2), (sides[1], 1))):
            name = "weights" if channel is None else f"channel {channel[place]}"
            if self.case.entry == "pairwise_log_overlap" or (place == 0 and not self._sums_over_rows(sides)):
                continue
            if self.sides[side].linear and channel is None:
                self.sums.add(side, name, *self._of_linear(term, sides, place, slope, extra))
            else:
                self.sums.add(side, name, grad.sum(axis), band.sum(axis))

    def _sums_over_rows(self, sides: tuple[int, int]) -> bool:
        """Whether the term of these sides is one number, with p's weights in it."""
        return sides != PQ or self.case.entry in ("log_overlap", "channel_log_overlap") or self.combined is not None

    def _of_linear(
        self, term: Term, sides: tuple[int, int], place: int, slope: Array, extra: Array
    ) -> tuple[Array, Array]:
        """Derivatives with respect to weights themselves: Σ g r / w, which has a limit where w is zero."""
        own, other = self.sides[sides[place]], self.sides[sides[1 - place]]
        logs = other.log_weights[:, None] if place == 0 else other.log_weights[:, :, None]
        value = term.value.reshape(term.value.shape + (1,) * (3 - term.value.ndim))
        x = term.pairs.logits - value
        if self._sums_over_rows(sides):
            x = np.where(logs == -np.inf, -np.inf, x + logs)
        shares = np.where(np.isfinite(value), np.exp(x), 0)
        usable = np.isfinite(own.means).all(-1)
        for t in (own.variances, own.factor, own.covariance):
            if t is not None:
                usable = usable & np.isfinite(t).all(tuple(range(2, t.ndim)))
        usable = usable | own.counts
        usable = usable[:, :, None] if place == 0 else usable[:, None]
        shares = np.where(usable & ((slope != 0) | (extra > 0)), shares, 0)
        grad = np.where(shares == 0, 0, slope * shares)
        unit = self._unit(sides) + self._weight_unit(sides)
        if self.case.entry == "responsibilities":
            extra = extra + 4 * unit  # the slope is a difference, of upstream gradients near 1
        sizes = term.sizes.reshape(value.shape)
        errors = np.where(np.isfinite(term.pairs.sizes), unit * (1 + term.pairs.sizes + np.abs(x) + sizes), 0)
        errors = np.expm1(errors + term.relative) + 4 * self.computed.eps
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
            if name == "p_log_variances" and self.case.mode != "plain" and leaf.dtype != torch.float64:
                logs = self._leaf(name)  # of which values decide nothing there, see csdiv.cs_regularizer
                band = np.where((logs < -20) | (logs > 60), np.inf, band)
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
        if kind == "factor":  # R = L Q, and Q mixes the columns
            band = np.broadcast_to(band.max(-1, keepdims=True), band.shape)
        return (np.tril(grad), np.tril(band)) if kind == "scale_tril" else (grad, band)

    def _summed(self, full: Array, leaf: Tensor) -> Array:
        """Sums over what the leaf is shared by."""
        full = np.reshape(full, (*self.batch, *full.shape[1:]))
        shape = tuple(leaf.shape)
        lead = full.ndim - len(shape)
        full = full.sum(tuple(range(lead))) if lead else full
        axes = tuple(k for k in range(len(shape)) if shape[k] == 1 and full.shape[k] != 1)
        return full.sum(axes, keepdims=True) if axes else full


def _lifted(t: Array) -> Array:
    """(B,) and (B, N) as they broadcast with (B, N, M)."""
    return t.reshape(t.shape + (1,) * (3 - t.ndim))
