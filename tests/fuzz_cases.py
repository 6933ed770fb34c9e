"""Random calls of csdiv's entries: a case follows from a seed and its index alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture

SCALARS = ("cs_divergence", "log_overlap", "ise", "log ise", "nise", "mmd2", "log mmd2", "cosine_similarity")
SELF = ("self_overlap", "renyi2_entropy")
OF_POINTS = ("log_prob", "responsibilities", "assign")
ENTRIES = (
    *SCALARS,
    *SELF,
    *OF_POINTS,
    "component_log_overlap",
    "pairwise_log_overlap",
    "cs_regularizer",
    "channel_log_overlap",
)
KNOWN = ("cs_divergence", "ise", "log ise", "nise")
"""Entries that take known self terms."""
DIAGONAL = ("diagonal", "spherical", "tied diagonal", "tied spherical")
FORMS = ("scale_tril", "factor", "covariance_matrix")
REGIMES = {
    "plain": 24,
    "near": 8,
    "variances mixed": 12,
    "scaled": 8,
    "spread": 8,
    "shifted": 8,
    "outlier": 6,
    "far": 6,
    "zero variances": 6,
    "infinite variance": 3,
    "infinite mean": 2,
    "NaN": 5,
    "negative variance": 3,
    "duplicates": 4,
}
SIZES = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70)
DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40)
BATCHES = (
    ((3,), (3,)),
    ((3,), ()),
    ((), (2,)),
    ((2, 1), (1, 3)),
    ((2,), (1,)),
    ((0,), ()),
    ((2, 1), (2, 0)),
    ((4,), (4,)),
)


@dataclass
class Case:
    seed: int
    index: int
    entry: str
    dim: int = 1
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    leaves: dict[str, Tensor] = field(default_factory=dict)  # "p_means", "q_scale_tril", "bandwidth", ...
    needs: tuple[str, ...] = ()
    backend: str = "auto"
    mode: str = "plain"  # "vjp": torch.func; "vmap": over the first dimension of every leaf
    upstream: str = "random"
    threads: int = 1
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {tuple(t.shape)} {str(t.dtype)[6:]}" for n, t in self.leaves.items())
        return f"{self.entry}: {'; '.join(self.notes)}; {self.backend}, {self.mode}, upstream {self.upstream}; {shapes}"

    @property
    def dtype(self) -> torch.dtype:
        """What the result has."""
        dtype = torch.promote_types(*self.dtypes)
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def call(self, leaves: dict[str, Tensor]) -> Tensor:
        """The entry with these tensors for its own."""
        entry, backend = self.entry.removeprefix("log ") if " " in self.entry else self.entry, self.backend
        options = {"backend": backend} | {n: leaves[n] for n in ("p_self_overlap", "q_self_overlap") if n in leaves}
        if self.entry.startswith("log "):
            options["log"] = True
        q = _mixture(leaves, "q")
        if entry == "cs_regularizer":
            known = {"prior_self_overlap": options.pop("q_self_overlap")} if "q_self_overlap" in options else {}
            return csdiv.cs_regularizer(leaves["p_means"], leaves["p_log_variances"], q, **known, **options)
        if entry in OF_POINTS:
            x = leaves["p_means"] if len([n for n in leaves if n[0] == "p"]) == 1 else _mixture(leaves, "p")
            return getattr(q, entry)(x, **options)
        p = _mixture(leaves, "p")
        if entry == "self_overlap":
            return csdiv.log_overlap(p, backend=backend)
        if entry == "renyi2_entropy":
            return csdiv.renyi2_entropy(p, backend=backend)
        if entry == "mmd2":
            return csdiv.mmd2(p, q, leaves["bandwidth"], **options)
        if entry == "channel_log_overlap":
            return csdiv.channel_log_overlap(p, q, leaves["p_channels"], leaves["q_channels"], backend=backend)
        return getattr(csdiv, entry)(p, q, **options)


PARAMETERS = ("variances", *FORMS, "weights", "log_weights")


def _mixture(leaves: dict[str, Tensor], side: str) -> GaussianMixture | None:
    own = {n: leaves[f"{side}_{n}"] for n in PARAMETERS if f"{side}_{n}" in leaves}
    return GaussianMixture(leaves[f"{side}_means"], **own) if f"{side}_means" in leaves else None


class Generator:
    """Draws one case."""

    def __init__(self, seed: int, index: int, only: str | None = None) -> None:
        self.rng = np.random.default_rng([seed, index])
        entry = only or self.pick(ENTRIES)
        self.case = Case(seed, index, entry)

    def pick(self, values: object, weights: object = None) -> object:
        values = list(values)
        p = None if weights is None else np.array(list(weights), float) / sum(weights)
        return values[int(self.rng.choice(len(values), p=p))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def draw(self) -> Case:
        case = self.case
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        first = self.pick(dtypes, (55, 37, 4, 4))
        case.dtypes = (first, self.pick(dtypes[:2]) if self.chance(0.04) else first)
        self.full = self.chance(0.3) and first in dtypes[:2] and case.dtypes[1] in dtypes[:2]
        self.batch = ((), ())
        if self.chance(0.35):
            self.batch = self.pick(BATCHES)
        if case.entry in SELF:
            case.dtypes = (first, first)
        case.mode = self.pick(("plain", "vjp", "vmap"), (86, 8, 6))
        if case.mode == "vmap":
            self.batch = ((2,), (2,))
        self.sizes()
        self.regime = self.pick(REGIMES, REGIMES.values())
        if self.full and self.regime in (
            "zero variances",
            "infinite variance",
            "infinite mean",
            "variances mixed",
            "far",
        ):
            self.regime = "plain"
        half = torch.float16 in case.dtypes or torch.bfloat16 in case.dtypes
        if half and self.regime in ("variances mixed", "scaled", "outlier", "far"):
            self.regime = "plain"  # float16 ends at 65504
        case.notes.append(self.regime)
        self.make_sides()
        self.make_others()
        case.backend = self.pick(("auto", "cpu", "reference"), (60, 20, 20))
        if self.full and case.dim > 32 and case.backend == "cpu":
            case.backend = "auto"
        case.upstream = self.pick(("random", "ones", "zero", "small"), (80, 12, 3, 5))
        case.threads = int(self.rng.integers(1, 3))
        names = list(case.leaves)
        if self.chance(0.2) and case.mode != "vjp":
            names = [n for n in names if self.chance(0.5)]
        case.needs = () if case.entry == "assign" else tuple(names)
        self.lay_out()
        return case

    def sizes(self) -> None:
        count = math.prod(np.broadcast_shapes(*self.batch)) or 1
        limit, power = (60_000 // count, 1) if not self.full else (150_000 // count, 3)
        dims = DIMS if not self.full else DIMS[:15]
        self.case.dim = int(self.pick(dims))
        if not self.full and self.chance(0.05):
            self.case.dim = int(self.rng.integers(90, 140))
        if self.full and self.chance(0.04):
            self.case.dim, limit = int(self.pick((31, 32, 33, 35))), 400_000
        most = max(1, int((limit / self.case.dim**power) ** 0.5))
        choices = [s for s in SIZES if s <= most] or [1]
        self.n, self.m = int(self.pick(choices)), int(self.pick(choices))
        if self.chance(0.15):  # few rows of many columns
            self.n, self.m = (1, min(700, most * most)) if self.chance(0.5) else (min(300, most * most), 1)
            if self.case.entry in (*SCALARS, *SELF, "cs_regularizer") and not self.full:
                self.n, self.m = min(self.n, 70), min(self.m, 70)
            elif self.case.entry in (*SCALARS, *SELF, "cs_regularizer"):
                self.n, self.m = min(self.n, most), min(self.m, most)

    def make_sides(self) -> None:
        case = self.case
        structures = [self.pick((*DIAGONAL, "points"), (45, 15, 15, 15, 10)) for _ in range(2)]
        if self.full:
            which = self.rng.integers(1, 4)
            for k in range(2):
                if which & (k + 1):
                    structures[k] = self.pick(("full", "tied full"))
        if case.entry in SELF:
            structures[0] = structures[1] if self.full and not structures[0].endswith("full") else structures[0]
            self.full = structures[0].endswith("full")
        of_points = case.entry in OF_POINTS and not (case.entry != "log_prob" and self.chance(0.3))
        if of_points or case.entry == "cs_regularizer":
            structures[0] = "diagonal"
            self.full = structures[1].endswith("full")
        case.notes.append(" + ".join(structures))
        self.conditions = self.condition(structures, of_points)
        self.centre = 0.0 if self.regime != "shifted" else 10.0 ** self.uniform(1.0, 5.0)
        self.exponent = (
            self.uniform(-30.0, 30.0) if case.dtype == torch.float64 or not self.full else self.uniform(-8, 8)
        )
        if case.entry in ("mmd2", "log mmd2", "cs_regularizer"):
            self.exponent = self.uniform(-6.0, 6.0)
        near = self.regime == "near" and case.entry not in OF_POINTS and structures[1] != "points"
        if near and case.entry not in (*SELF, "cs_regularizer"):
            self.side("p", self.n, structures[1], self.batch[0])
            case.dtypes = (case.dtypes[0],) * 2
            size = 10.0 ** self.uniform(-9.0, -2.0) if self.chance(0.9) else 0.0
            for name, t in list(case.leaves.items()):
                if case.entry != "channel_log_overlap" or "weights" not in name:
                    noise = torch.as_tensor(self.rng.standard_normal(tuple(t.shape)))
                    if "tril" not in name:
                        noise = noise if "covariance" not in name else noise.new_zeros(())
                    case.leaves["q" + name[1:]] = (t.double() * (1.0 + size * noise)).to(t.dtype)
            case.notes.append(f"{size:.0e}")
            return
        if of_points:
            self.points(structures[1])
        elif case.entry == "cs_regularizer":
            self.codes()
        else:
            self.side("p", self.n, structures[0], self.batch[0])
        if case.entry not in SELF:
            self.side("q", self.m, structures[1], self.batch[1])

    def condition(self, structures: list[str], of_points: bool) -> float:
        """The largest condition of a factor: its square may be formed unless the covariances are one on each side."""
        largest = 5.0
        if self.case.dtypes[1] == torch.float32:
            largest = 4.0
        if of_points or all(s == "tied full" for s in structures):
            largest = 9.0 if torch.float32 not in self.case.dtypes else 6.0
        return 10.0 ** (self.uniform(0.0, largest) if self.chance(0.5) else 0.5)

    def tensor(self, side: str, name: str, value: np.ndarray) -> None:
        dtype = self.case.dtypes[side == "q"]
        self.case.leaves[f"{side}_{name}"] = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)

    def batch_of(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        """That of a parameter: the side's, or one that it broadcasts."""
        if not batch or self.case.mode == "vmap" or self.chance(0.7):
            return batch
        return tuple(1 if self.chance(0.3) else b for b in batch) if self.chance(0.5) else ()

    def means(self, k: int, batch: tuple[int, ...]) -> np.ndarray:
        rng, d, regime = self.rng, self.case.dim, self.regime
        means = rng.standard_normal((*batch, k, d))
        if regime == "spread":
            means *= 10.0 ** self.uniform(0.5, 3.0)
        if regime == "variances mixed":
            means *= 10.0 ** self.uniform(-10.0, 10.0)
        if regime == "scaled":
            means *= 10.0 ** (0.5 * self.exponent)
        if regime == "outlier":
            means[..., rng.integers(k), :] *= 10.0 ** self.uniform(2.0, 19.0)
        if regime == "far":
            means[..., rng.random(k) < 0.5, :] += 10.0 ** self.uniform(17.0, 20.0)
        if regime == "infinite mean":
            means[..., rng.integers(k), rng.integers(d)] = self.pick((math.inf, -math.inf))
        if regime == "NaN" and self.chance(0.4):
            means[..., rng.integers(k), rng.integers(d)] = math.nan
        if regime == "duplicates":
            means[..., k // 2 :, :] = means[..., : k - k // 2, :]
        return means + self.centre

    def variances(self, shape: tuple[int, ...]) -> np.ndarray:
        rng, regime = self.rng, self.regime
        decades = {"variances mixed": 30.0 if self.chance(0.5) else 6.0}.get(regime, 0.3 if self.chance(0.7) else 1.5)
        variances = 10.0 ** rng.uniform(-decades, decades, shape)
        if regime == "scaled":
            variances *= 10.0**self.exponent
        if variances.size and regime in ("infinite variance", "negative variance", "NaN") and self.chance(0.7):
            value = {"infinite variance": math.inf, "NaN": math.nan}.get(regime, -0.5)
            variances[..., rng.integers(shape[-2]), rng.integers(shape[-1])] = value
        if regime == "zero variances":
            variances[rng.random(shape) < 0.3] = 0.0
        return variances

    def side(self, name: str, k: int, structure: str, batch: tuple[int, ...]) -> None:
        d, own = self.case.dim, self.batch_of(batch)
        means = self.means(k, own)
        rows = 1 if structure.startswith("tied") or structure == "points" else k
        batch_of_spread = self.batch_of(batch)
        absent = np.zeros(k, bool)
        if self.case.entry != "channel_log_overlap":
            absent = self.weights(name, k, self.batch_of(batch))
        if absent.any() and self.chance(0.4):
            garbage = (1e20, -1e14, math.inf, math.nan)[: 4 if not structure.endswith("full") else 2]
            means[..., absent, :] = self.pick(garbage)
            self.case.notes.append(
                f"{name}: absent components at {means[..., absent, :].flat[0]:g}" if means.size else ""
            )
        self.tensor(name, "means", means)
        if structure.endswith("full"):
            form = (
                self.pick(FORMS)
                if self.conditions < 10.0 ** (2.3 if self.case.dtypes[0] == torch.float32 else 5)
                else (self.pick(FORMS[:2]))
            )
            self.tensor(name, form, self.matrices((*batch_of_spread, rows, d, d), form))
            return
        columns = 1 if structure.endswith("spherical") or structure == "points" else d
        variances = self.variances((*batch_of_spread, rows, columns))
        if structure == "points":
            variances = np.zeros_like(variances)
        if absent.any() and rows == k and self.chance(0.3):
            variances[..., absent, :] = self.pick((0.0, math.nan, -1.0, 1e30))
        self.tensor(name, "variances", variances)

    def matrices(self, shape: tuple[int, ...], form: str) -> np.ndarray:
        """Rotations times scales down to 1 / condition, as factors of the form."""
        d, rng = shape[-1], self.rng
        scale = 10.0 ** (0.5 * self.exponent) if self.regime == "scaled" else 1.0
        spectrum = scale * self.conditions ** -rng.permuted(
            np.broadcast_to(np.linspace(0.0, 1.0, d), shape[:-1]), axis=-1
        )
        factor = np.linalg.qr(rng.standard_normal(shape))[0] * spectrum[..., None, :]
        if form == "factor":
            return factor
        lower = np.linalg.qr(factor.swapaxes(-1, -2))[1].swapaxes(-1, -2)
        lower = lower * np.where(np.diagonal(lower, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
        if form == "scale_tril":
            junk = np.triu(rng.standard_normal((d, d)), 1) if self.chance(0.2) else 0.0  # is not read
            return np.tril(lower) + junk
        product = lower @ lower.swapaxes(-1, -2)
        return 0.5 * (product + product.swapaxes(-1, -2))

    def weights(self, name: str, k: int, batch: tuple[int, ...]) -> np.ndarray:
        """Makes the weights of a side, and tells which are zero in all of the batch."""
        rng, kind = self.rng, self.pick(("none", "log_weights", "weights"), (20, 50, 30))
        unused = ("component_log_overlap", *OF_POINTS) if name == "p" else ()
        if self.case.entry in ("pairwise_log_overlap", *unused) and batch:
            kind = "none"  # weights that are not used give the result no batch
        absent = np.zeros(k, bool)
        if kind == "none":
            return absent
        logs = rng.standard_normal((*batch, k)) * (1.0 if self.chance(0.8) else 10.0)
        if self.chance(0.7):
            logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
        elif self.chance(0.5):
            logs += self.uniform(-20.0, 20.0)
        special = self.rng.random()
        if special < 0.3 and k > 1:
            absent = rng.random(k) < 0.4
            absent[rng.integers(k)] = False
        elif special < 0.34:
            absent[:] = True
        logs[..., absent] = -math.inf
        if special > 0.98 and kind == "log_weights":
            logs[..., rng.integers(k)] = self.pick((math.inf, math.nan))
            self.case.notes.append(f"{name}: a weight not finite")
        self.tensor(name, kind, np.exp(logs) if kind == "weights" else logs)
        return absent

    def points(self, structure: str) -> None:
        n = 0 if self.chance(0.02) and self.case.mode == "plain" else self.n
        means = self.means(max(n, 1), self.batch_of(self.batch[0]))[..., :n, :]
        self.tensor("p", "means", means)

    def codes(self) -> None:
        batch = self.batch[0]
        logs = self.rng.uniform(-2.0, 2.0, (*batch, self.n, self.case.dim))
        if self.chance(0.2):
            logs *= 100.0
        elif self.chance(0.1):
            logs = np.full_like(logs, self.pick((-200.0, 200.0, -60.0)))
        if np.abs(logs).max(initial=0.0) > 80.0 and self.regime in ("outlier", "far", "variances mixed"):
            self.regime = "plain"  # equation (10) is for distances whose squares are below e^85
        self.tensor("p", "means", self.means(self.n, batch))
        self.tensor("p", "log_variances", logs)

    def make_others(self) -> None:
        case, rng = self.case, self.rng
        batch = np.broadcast_shapes(*self.batch) if case.entry not in SELF else self.batch[0]
        if case.entry.endswith("mmd2"):
            shape = batch if case.mode == "vmap" or self.chance(0.3) else ()
            case.leaves["bandwidth"] = torch.as_tensor(10.0 ** rng.uniform(-1.0, 1.0, shape)).to(case.dtype)
        if case.entry == "channel_log_overlap":
            for side, k, own in zip("pq", (self.n, self.m), self.batch, strict=True):
                k = case.leaves[f"{side}_means"].shape[-2]
                channels = rng.standard_normal((*self.batch_of(own), int(rng.integers(1, 5)), k))
                if self.chance(0.3):
                    channels[rng.random(channels.shape) < 0.3] = -math.inf
                self.tensor(side, "channels", channels)
        takes = case.entry in KNOWN or case.entry == "cs_regularizer"
        for side in "pq" if takes and case.mode != "vmap" and self.chance(0.15) else "":
            if (self.chance(0.6) and case.entry != "cs_regularizer") or (
                side == "q" and case.entry == "cs_regularizer"
            ):
                own = self.batch["pq".index(side)]
                case.leaves[f"{side}_self_overlap"] = torch.as_tensor(rng.uniform(-3.0, 3.0, own), dtype=torch.float64)

    def lay_out(self) -> None:
        """Now and then a tensor becomes a view: strided, transposed or expanded."""
        for name, t in self.case.leaves.items():
            if t.ndim and t.numel() and self.chance(0.12):
                kind = self.pick(("strided", "transposed", "expanded"))
                if kind == "strided":
                    t = torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)[..., ::2]
                elif kind == "transposed" and t.ndim > 1:
                    t = t.mT.contiguous().mT
                elif kind == "expanded" and t.ndim > 2 and name.endswith(("means", "variances")):
                    t = t[:1].clone().expand(t.shape)
                self.case.leaves[name] = t


def draw(seed: int, index: int, only: str | None = None) -> Case:
    return Generator(seed, index, only).draw()
