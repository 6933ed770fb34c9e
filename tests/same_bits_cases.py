"""The cases of same_bits.py: inputs by their names, and what each computes of them with csdiv's public functions."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture

Results = dict[str, Tensor | str]
"""The outputs of a case by name; what is raised is one of them."""

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
P, Q = ("p_means", "p_spread", "p_log_weights"), ("q_means", "q_spread", "q_log_weights")
"""The inputs of a pair; spread stands for variances, covariances or their factors, for codes log variances."""
DIAGONAL = ("diagonal", "spherical", "tied diagonal", "tied spherical")
MATRIX = {"covariance": "covariance_matrix", "tied covariance": "covariance_matrix"}
MATRIX |= {"tril": "scale_tril", "tied tril": "scale_tril"}
STRUCTURES = (*DIAGONAL, *MATRIX, "points")


def channels(t: dict[str, Tensor], count: int, backend: str) -> Tensor:
    """``count`` weightings of p's components, one less of q's; 6 are one pass where there are many components."""
    a, b = (torch.stack([t[w] * (1.0 + 0.25 * c) for c in range(k)], -2) for w, k in ((P[2], count), (Q[2], count - 1)))
    p, q = (mixture({n: v for n, v in t.items() if not n.endswith("log_weights")}, side) for side in "pq")
    return csdiv.channel_log_overlap(p, q, a, b, backend=backend)


def mixture(t: dict[str, Tensor], side: str) -> Any:
    given = {name[2:]: value for name, value in t.items() if name.startswith(f"{side}_")}
    return GaussianMixture(**given) if len(given) > 1 else None  # type: ignore[arg-type]


def regularizer(t: dict[str, Tensor], q: GaussianMixture, **on: str) -> Tensor:
    own = t.get("prior_self_overlap")
    return csdiv.cs_regularizer(t["p_means"], t["p_variances"], q, prior_self_overlap=own, **on)


ENTRIES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "cs_divergence": (P + Q, lambda t, p, q, **on: csdiv.cs_divergence(p, q, **on)),
    "log_overlap": (P + Q, lambda t, p, q, **on: csdiv.log_overlap(p, q, **on)),
    "self_overlap": (P, lambda t, p, q, **on: csdiv.log_overlap(p, **on)),
    "component_log_overlap": (P[:2] + Q, lambda t, p, q, **on: csdiv.component_log_overlap(p, q, **on)),
    "pairwise_log_overlap": (P[:2] + Q[:2], lambda t, p, q, **on: csdiv.pairwise_log_overlap(p, q, **on)),
    "cs_regularizer": (P[:2] + Q, lambda t, p, q, **on: regularizer(t, q, **on)),
    "cs_regularizer_of_known_prior": (
        (*P[:2], *Q, "prior_self_overlap"),
        lambda t, p, q, **on: regularizer(t, q, **on),
    ),
    "log_prob": (P[:1] + Q, lambda t, p, q, **on: q.log_prob(t["p_means"], **on)),
    "responsibilities": (P[:1] + Q, lambda t, p, q, **on: q.responsibilities(t["p_means"], **on)),
    "responsibilities_of_mixture": (P[:2] + Q, lambda t, p, q, **on: q.responsibilities(p, **on)),
    "assign": (P[:1] + Q, lambda t, p, q, **on: q.assign(t["p_means"], **on)),
    "assign_mixture": (P[:2] + Q, lambda t, p, q, **on: q.assign(p, **on)),
    "channels": (P + Q, lambda t, p, q, **on: channels(t, 2, **on)),
    "channels_at_once": (P + Q, lambda t, p, q, **on: channels(t, 6, **on)),
    "ise": (P + Q, lambda t, p, q, **on: csdiv.ise(p, q, **on)),
    "log_ise": (P + Q, lambda t, p, q, **on: csdiv.ise(p, q, log=True, **on)),
    "nise": (P + Q, lambda t, p, q, **on: csdiv.nise(p, q, **on)),
    "mmd2": ((*P, *Q, "bandwidth"), lambda t, p, q, **on: csdiv.mmd2(p, q, t["bandwidth"], **on)),
    "log_mmd2": ((*P, *Q, "bandwidth"), lambda t, p, q, **on: csdiv.mmd2(p, q, t["bandwidth"], log=True, **on)),
    "renyi2_entropy": (P, lambda t, p, q, **on: csdiv.renyi2_entropy(p, **on)),
    "cosine_similarity": (P + Q, lambda t, p, q, **on: csdiv.cosine_similarity(p, q, **on)),
    "cs_divergence_of_same": (P, lambda t, p, q, **on: csdiv.cs_divergence(p, p, **on)),
    "log_overlap_of_same": (P, lambda t, p, q, **on: csdiv.log_overlap(p, p, **on)),
    "component_log_overlap_of_same": (P, lambda t, p, q, **on: csdiv.component_log_overlap(p, p, **on)),
}
"""The inputs of each entry, and the call."""
KERNELS = tuple(ENTRIES)[:6]
"""Those that are not made of others."""


class Case(NamedTuple):
    backend: str
    entry: str
    dtype: torch.dtype = F32
    n: int = 17
    m: int = 31
    dim: int = 5
    structures: tuple[str, str] = ("diagonal", "diagonal")
    layout: str = "contiguous"
    batch: tuple[tuple[int, ...], ...] = ((),) * 6  # of each of P + Q
    needs: tuple[str, ...] | None = None  # None: every input
    scale: str = "plain"
    grad: str = "different"  # upstream
    mode: str = "plain"
    isa: str = ""
    threads: int = 1

    def __str__(self) -> str:
        changed = [
            f"{name}={value}".replace("torch.", "").replace("'", "")
            for name, value, default in zip(self._fields[2:], self[2:], Case("", "")[2:], strict=True)
            if value != default
        ]
        return "/".join((self.backend, self.entry, *changed)).replace(" ", "_")


SIZES = [(1, 1, 1), (1, 513, 2), (2, 15, 3), (15, 16, 7), (16, 17, 16), (17, 33, 15), (33, 31, 64), (511, 2, 4)]
SIZES += [(513, 33, 9), (63, 65, 8), (64, 64, 32), (127, 129, 2), (5, 20, 17), (9, 5, 65), (4, 6, 130)]
LARGE = [(140, 150, 2), (300, 1030, 2), (1030, 300, 2), (1100, 40, 2), (40, 1100, 2), (17, 1500, 2), (255, 257, 3)]
LARGE += [(1100, 1100, 2), (20, 100, 1700), (33, 200, 900)]
HUGE = [(150, 10000, 3), (40, 66000, 1), (2003, 3001, 3), (700, 500, 260)]
DIMS = (1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129)
MATRIX_DIMS = (1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
LANES = [(64, 16, 16, 1), (37, 5, 7, 3), (16, 32, 2, 8), (17, 1, 1, 2), (203, 10, 9, 2), (3, 4, 4, 2)]
BATCHES: list[tuple[tuple[int, ...], ...]] = [(p,) * 3 + (q,) * 3 for p, q in (((3,), ()), ((), (3,)), ((0,), ()))]
BATCHES += [(p,) * 3 + (q,) * 3 for p, q in (((3, 1), (1, 4)), ((2, 1), (2, 0)), ((1,), (3,)), ((2, 3), (2, 3)))]
BATCHES += [((3,), (), (), (), (3,), ()), ((), (3,), (), (2, 1), (), ()), ((), (), (3,), (3,), (), (2, 1))]
LAYOUTS = ("strided", "transposed", "expanded", "misaligned")
ODD = ["far apart", "tiny variance", "zero variance", "no weight", "nan mean", "inf mean", "negative variance"]
ODD += ["inf variance", "nan variance", "inf weight", "nan weight"]
SCALES = ["uniform", "-inf weights", "unnormalised", "variances 1e±30", "spread 30", "shifted 1e4", "near", "equal"]
MODES = ("twice", "func", "vmap", "jvp", "double", "no_grad", "autocast")


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [some for size in range(len(names)) for some in itertools.combinations(names, size)]


def general(backend: str) -> Iterator[Case]:
    """The whole contract, in small sizes."""
    for entry, (inputs, _) in ENTRIES.items():
        codes, own = entry.startswith("cs_regularizer"), entry in KERNELS
        case = functools.partial(Case, backend, entry)
        yield from (case(dtype, *size) for size in [(17, 31, 5), *SIZES] for dtype in (F32, F64))
        yield from (case(F32 if dim % 2 else F64, 7, 18, dim) for dim in DIMS)
        yield from (case(dtype, layout=layout) for layout in LAYOUTS for dtype in (F32, F64, BF16))
        yield from (case(dtype, mode=mode) for mode in MODES for dtype in (F32, F64, F16))
        for batch in BATCHES:
            if not codes or batch[0] == batch[1]:
                yield from (case(F32, 4, 6, batch=batch, mode=mode) for mode in ("plain", "func"))
        yield from (case(F32, 4, 6, needs=needs) for needs in subsets(inputs) if own or len(needs) < 2)
        yield from (case(dtype, scale=scale) for scale in SCALES + ODD for dtype in (F32, F64))
        yield from (case(F32, scale=scale, mode="func") for scale in SCALES + ODD)
        yield from (case(F32, 33, 20, 3, grad=grad) for grad in ("common", "zero", "row"))
        rows = STRUCTURES if "p_spread" in inputs and not codes else DIAGONAL[:1]
        for s, t in itertools.product(rows, STRUCTURES if "q_spread" in inputs else DIAGONAL[:1]):
            yield from (case(dtype, 5, 11, 3, structures=(s, t)) for dtype in (F32, F64))
            yield from (case(F32, 5, 20, 17, structures=(s, t), mode=mode) for mode in ("plain", "func"))
            if s in MATRIX or t in MATRIX:
                yield case(F32, 4, 6, 3, structures=(s, t), batch=((2, 1),) * 3 + ((3,),) * 3)
            if s == t or (s == "diagonal" and t in MATRIX):
                yield from (case(F64, 3, 5, dim, structures=(s, t)) for dim in (MATRIX_DIMS if own else (8, 33)))
        if own and "q_spread" in inputs:
            some = subsets(inputs)
            yield from (case(F32, 4, 6, 2, structures=("diagonal", "covariance"), needs=needs) for needs in some)


def lanes(backend: str) -> Iterator[Case]:
    """Batches of tiny problems, odd ones among them."""
    for entry, (b, n, m, dim) in itertools.product(("cs_divergence", "log_overlap", "self_overlap", "ise"), LANES):
        case = functools.partial(Case, backend, entry, n=n, m=m, dim=dim, batch=((b,),) * 6)
        yield from (case(dtype=dtype, needs=needs) for dtype in (F32, F64) for needs in (None, (), P))
        yield from (case(batch=((b,),) * 3 + ((),) * 3, mode=mode) for mode in ("plain", "func"))
        yield case(structures=("spherical", "tied diagonal"), grad="common")
    for entry, scale in itertools.product(("cs_divergence", "self_overlap"), ODD + SCALES):
        for items, needs in itertools.product(("20:21", "8:16", "3:33:7"), (None, (), P[1:])):
            where = f"{scale} in {items}"
            yield Case(backend, entry, F32, 4, 5, 2, batch=((40,),) * 6, scale=where, needs=needs)


def large(backend: str, sizes: Sequence[tuple[int, int, int]] = tuple(LARGE)) -> Iterator[Case]:
    for entry, (n, m, dim) in itertools.product(KERNELS, sizes):
        m = min(m, 3001) if entry == "cs_divergence" else m  # whose self terms would take seconds
        case = functools.partial(Case, backend, entry, n=n, m=m, dim=dim)
        yield from (case(dtype=dtype, needs=needs) for dtype in (F32, F64) for needs in (None, P, Q, ()))
        yield from (case(grad=grad, mode=mode) for grad, mode in (("common", "plain"), ("different", "func")))
    for structure in ("diagonal", "tied spherical", "covariance", "tied tril"):
        yield Case(backend, "channels_at_once", F32, 200, 220, 3, (structure, "diagonal"))
        yield Case(backend, "channels_at_once", F64, 220, 200, 4, (structure, structure))


def number(name: str) -> int:
    return zlib.crc32(name.encode())


def few(cases: Iterable[Case], share: int) -> Iterator[Case]:
    """One case of ``share``, chosen by name."""
    return (case for case in cases if number(str(case)) % share == 0)


def every_case(isas: Sequence[str]) -> Iterator[Case]:
    yield from itertools.chain(general("cpu"), lanes("cpu"), large("cpu"), few(large("cpu", HUGE), 3))
    for isa in isas:
        some = itertools.chain(few(general("cpu"), 12), few(lanes("cpu"), 4), few(large("cpu"), 4))
        yield from (case._replace(isa=isa) for case in some)
    some = itertools.chain(few(lanes("cpu"), 3), few(large("cpu"), 2), few(large("cpu", HUGE), 6))
    yield from (case._replace(threads=2) for case in some)
    for backend in ("emulation", "reference"):
        yield from itertools.chain(few(general(backend), 3), few(lanes(backend), 12))
    yield from (case for case in few(large("emulation"), 8) if case.n * case.m * case.dim < 200_000)
    yield from few(general("auto"), 12)
    for entry in ENTRIES:
        yield from (Case("auto", entry, dtype, 5, 11, 3, mode=mode) for mode in MODES for dtype in (F32, F64))
    yield from (Case("auto", entry, F32, 5, 11, 3, mode="compile") for entry in ("cs_divergence", "cs_regularizer"))
    for entry in (*KERNELS, "assign"):
        yield Case("interpreter", entry, F32, 5, 9, 3)
        yield Case("interpreter", entry, F64, 4, 17, 18, ("spherical", "tied spherical"), needs=P[:1] + Q[2:])


def make(case: Case) -> dict[str, Tensor]:
    """The inputs of a case, made in float64 from its name."""
    g = torch.Generator().manual_seed(number(str(case)))
    kind, _, items = case.scale.partition(" in ")
    decades, distance = (30.0, 1e3) if kind == "variances 1e±30" else (0.3, 30.0 if kind == "spread 30" else 1.0)
    made: dict[str, Tensor] = {"bandwidth": torch.tensor(0.7, dtype=F64)}
    batches = (case.batch[:3], case.batch[3:])
    for side, size, structure, batch in zip("pq", (case.n, case.m), case.structures, batches, strict=True):
        shape = (1 if structure.startswith("tied") else size, 1 if structure.endswith("spherical") else case.dim)
        spread = 10.0 ** (decades * (2.0 * torch.rand(*batch[1], *shape, dtype=F64, generator=g) - 1.0))
        if structure == "points":
            spread = torch.zeros(1, 1, dtype=F64)
        elif structure in MATRIX:
            lower = torch.randn(*batch[1], *shape, case.dim, dtype=F64, generator=g).tril(-1) / case.dim
            factor = lower + spread.diag_embed()
            spread = factor if structure.endswith("tril") else factor @ factor.mT
        made[f"{side}_means"] = distance * torch.randn(*batch[0], size, case.dim, dtype=F64, generator=g)
        made[f"{side}_spread"] = spread.log() if case.entry.startswith("cs_reg") and side == "p" else spread
        made[f"{side}_log_weights"] = torch.randn(*batch[2], size, dtype=F64, generator=g).log_softmax(-1)
    made["prior_self_overlap"] = made["q_log_weights"].sum(-1)
    inputs = ENTRIES[case.entry][0]
    change(made, kind, "q" if "q_means" in inputs else "p", slice(*map(int, items.split(":"))) if items else ...)
    return {name: made[name].to(case.dtype) for name in inputs if name in made}


def change(t: dict[str, Tensor], kind: str, side: str, items: Any) -> None:
    """Changes the inputs as ``Case.scale`` says: those of ``side``, of the problems ``items`` of a batch."""
    means, spread, log_weights = (t[f"{side}_{name}"][items] for name in ("means", "spread", "log_weights"))
    size = math.nan if kind.startswith("nan") else math.inf
    if kind in ("near", "equal"):
        t |= {f"q{name[1:]}": t[name].clone() for name in P}
        t["q_means"] += 1e-4 * (kind == "near")
    elif kind == "uniform":
        del t["p_log_weights"], t["q_log_weights"]
    elif kind == "shifted 1e4":
        t |= {name: t[name] + 1e4 for name in (P[0], Q[0])}
    elif kind in ("far apart", "unnormalised"):
        (means if kind == "far apart" else log_weights).add_(1e20 if kind == "far apart" else 7.0)
    elif kind in ("tiny variance", "zero variance"):
        spread.fill_(0.0 if kind == "zero variance" else 1e-30)
    elif kind in ("-inf weights", "no weight"):
        log_weights[..., :: 1 if kind == "no weight" else 2] = -math.inf
    elif kind.endswith(("mean", "variance")):
        (means if kind.endswith("mean") else spread)[..., -1, -1] = -0.1 if kind.startswith("negative") else size
    elif kind.endswith("weight"):
        log_weights[..., -1] = size


def view(t: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A contiguous tensor, and the view of it in this layout that has the shape of ``t``."""
    shape = t.shape
    if layout == "misaligned":
        return torch.cat([t.new_full((1,), math.nan), t.flatten()]), lambda base: base[1:].view(shape)
    if t.ndim < 2 or layout == "contiguous":
        return t, lambda base: base
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2), lambda base: base[..., ::2]
    if layout == "transposed":
        return t.mT.contiguous(), lambda base: base.mT
    return t[..., :1].clone(), lambda base: base.expand(shape)


def run(case: Case) -> Results:
    import csdiv._C as _C

    widest, found = _C.cpu_isa(), Results()
    try:
        torch.set_num_threads(case.threads)
        _C.cpu_set_isa(case.isa or widest)
        evaluate(case, found)
    except Exception as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    finally:
        _C.cpu_set_isa(widest)
    return found


def evaluate(case: Case, found: Results) -> None:
    viewed = {name: view(t, case.layout) for name, t in make(case).items()}
    wanted = [name for name in viewed if case.needs is None or name in case.needs]
    leaves = [viewed[name][0].requires_grad_() for name in wanted]
    plain = [t.detach() for t in leaves]
    mode = case.mode

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(wanted, tensors, strict=True))
        t = {name: as_view(given.get(name, base)) for name, (base, as_view) in viewed.items()}
        for side, structure in zip("pq", case.structures, strict=True):
            if f"{side}_spread" in t:
                t[f"{side}_{MATRIX.get(structure, 'variances')}"] = t.pop(f"{side}_spread")
        q = mixture(t, "q")
        p = None if case.entry.startswith(("cs_regularizer", "channels")) else mixture(t, "p")
        return ENTRIES[case.entry][1](t, p, q, backend=case.backend)

    def save(what: str, grads: Sequence[Tensor | None]) -> None:
        found.update((f"{what} of {n}", "none" if t is None else t) for n, t in zip(wanted, grads, strict=True))

    def upstream(value: Tensor) -> Tensor:
        if case.grad in ("common", "zero"):
            return torch.full(value.shape, -0.7 if case.grad == "common" else 0.0, dtype=value.dtype)
        shape = (*value.shape[:-1], 1) if case.grad == "row" and value.ndim else value.shape
        made = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        return made.to(value.dtype).expand(value.shape)

    if mode == "no_grad":
        with torch.no_grad():
            found["value"] = function(*leaves)
    elif mode == "jvp":
        outputs: Any = torch.func.jvp(function, tuple(plain), tuple(t.cos() for t in plain))
        found |= dict(zip(("value", "tangent"), outputs, strict=True))
    elif mode == "func":  # the way to the backward kernels of what gives its gradients with the value
        outputs = torch.func.vjp(function, *plain)
        found["value"] = outputs[0]
        save("gradient", outputs[1](upstream(outputs[0])))
    elif mode == "vmap":
        stacks = [torch.stack([t, t.abs()]) for t in plain]
        found["value"] = torch.func.vmap(function)(*stacks)
        total = torch.func.grad(lambda *t: function(*t).sum(), argnums=tuple(range(len(plain))))
        save("gradient", torch.func.vmap(total)(*stacks))
    else:
        call = torch.compile(function, backend="aot_eager") if mode == "compile" else function
        with torch.autocast("cpu", BF16, enabled=mode == "autocast"):
            value = call(*leaves)
        found["value"] = value
        if not value.requires_grad:
            return
        gradients = functools.partial(torch.autograd.grad, value, leaves, allow_unused=True)
        if mode == "twice":
            save("first gradient", gradients(upstream(value), retain_graph=True))
            save("gradient of the sum", gradients(torch.ones_like(value), retain_graph=True))
        firsts = gradients(upstream(value), create_graph=mode == "double")
        save("gradient", firsts)
        if mode == "double":
            total_square = torch.stack([t.square().sum() for t in firsts if t is not None]).sum()
            save("second derivative", torch.autograd.grad(total_square, leaves, allow_unused=True))


def others() -> dict[str, Callable[[], Any]]:
    """What is refused, and what surrounds the functions."""
    x, one, eye = torch.linspace(-1.0, 2.0, 12).view(4, 3), torch.ones(1, 1), torch.eye(3).expand(4, 3, 3)
    p, narrow = GaussianMixture(x, x.exp()), GaussianMixture(x[:, :2], one)
    two, three = (GaussianMixture(x.expand(b, 4, 3), one) for b in (2, 3))
    normal = torch.distributions.Independent(torch.distributions.Normal(x, x.exp()), 1)
    prior = csdiv.nn.GaussianMixturePrior(4, 3).initialize_(x, one)
    loss = csdiv.nn.CSDivergenceLoss("none")
    calls: dict[str, Callable[[], Any]] = {
        "no covariance": lambda: GaussianMixture(x),
        "two covariances": lambda: GaussianMixture(x, one, scale_tril=eye),
        "two weights": lambda: GaussianMixture(x, one, log_weights=x[:, 0], logits=x[:, 0]),
        "flat means": lambda: GaussianMixture(x[0], one),
        "integer means": lambda: GaussianMixture(x.long(), one),
        "no component": lambda: GaussianMixture(x[:0], one),
        "variances that do not fit": lambda: GaussianMixture(x, x[:, :2]),
        "weights that do not fit": lambda: GaussianMixture(x, one, log_weights=x[0]),
        "no factor": lambda: GaussianMixture(x, scale_tril=-eye),
        "no positive matrix": lambda: GaussianMixture(x, covariance_matrix=-eye),
        "validated": lambda: GaussianMixture(x, -one, validate=True),
        "sparse": lambda: GaussianMixture(x.to_sparse(), one),
        "immutable": lambda: setattr(p, "means", x),
        "bandwidth": lambda: csdiv.mmd2(p, p, -1.0),
        "channels that do not fit": lambda: csdiv.channel_log_overlap(p, p, x, x),
        "codes that do not fit": lambda: csdiv.cs_regularizer(x, x[:2], p),
        "codes of other dimension": lambda: csdiv.cs_regularizer(x, x, narrow),
        "flat points": lambda: p.log_prob(x[0]),
        "no points": lambda: p.log_prob(x[:0]),
        "repr": lambda: f"{p} {narrow} {two} {prior} {loss} {csdiv.backend_status()}",
        "loss": lambda: loss(normal, prior),
        "regularizer of module": lambda: csdiv.cs_regularizer(x, x, prior),
        "samples": lambda: GaussianMixture.from_samples(x, 0.3, weights=x[:, 0].exp()).log_prob(x),
        "distribution": lambda: GaussianMixture.from_distribution(p.to_distribution()).log_prob(x),
        "draws": lambda: (torch.manual_seed(0), p.sample(5))[1],
        "dtypes": lambda: csdiv.cs_divergence(p, p.to(F64)),
    }
    for name in ("cs_divergence", "log_overlap", "component_log_overlap", "pairwise_log_overlap", "nise"):
        call = functools.partial(getattr(csdiv, name))
        for what, q in {"dimension": narrow, "number": x, "device": p.to("meta")}.items():
            calls[f"{name} {what}"] = functools.partial(call, p, q)
        calls[f"{name} batch"] = functools.partial(call, two, three)
        calls |= {f"{name} {b}": functools.partial(call, p, p, backend=b) for b in ("cuda", "triton", "none")}
    return {f"other/{name}".replace(" ", "_"): call for name, call in calls.items()}


def outcome(call: Callable[[], Any]) -> Results:
    try:
        value = call()
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"value": value if isinstance(value, Tensor) else str(value)}
