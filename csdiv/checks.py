"""What a value has to be: the checks of constructors and entries, and tensors made from what users have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from csdiv.transforms import has_values

if TYPE_CHECKING:
    from csdiv.mixture import GaussianMixture

HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*HALF, torch.float32, torch.float64)


def as_float_tensor(value: Any, name: str) -> Tensor:
    """``value`` as a dense floating-point tensor, NumPy arrays included.

    An array shares its memory unless torch cannot: read-only, of another byte order, with strides that torch lacks.

    Raises:
        TypeError: not a tensor, or not floating point.
        NotImplementedError: sparse, quantised or nested.
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name}: a tensor expected, got {type_name(value)}")
        value = _from_numpy(value, name)
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        kind = "quantised" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        raise NotImplementedError(f"{name}: a dense tensor expected, got a {kind} one")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: floating point expected, got {value.dtype}")
    return value


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    strides_fit = all(s >= 0 and s % max(1, array.itemsize) == 0 for s in array.strides)
    if not (array.flags.writeable and array.dtype.isnative and strides_fit):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(array)
    except TypeError:
        raise TypeError(f"{name}: floating point expected, got an array of {array.dtype}") from None


def type_name(value: Any) -> str:
    """The type of ``value`` with its module: several libraries have a GaussianMixture."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def log_of_weights(weights: Tensor) -> Tensor:
    """log w, −inf at zero, whose gradient there is zero: csdiv.weights adds what is missing."""
    absent = weights == 0.0
    return torch.where(absent, -math.inf, torch.where(absent, 1.0, weights).log())


def shares(weights: Tensor) -> Tensor:
    """Linear weights scaled to sum to one, summed in float64 as in :func:`normalised`."""
    wide = weights.double()
    return (wide / wide.sum(-1, keepdim=True)).to(computing_dtype(weights.dtype))


def normalised(logits: Tensor) -> Tensor:
    """log softmax over components, summed in float64: float32 sums of many weights are off, those in half overflow."""
    return logits.double().log_softmax(-1).to(computing_dtype(logits.dtype))


def as_bandwidth(bandwidth: float | Tensor, like: Tensor) -> Tensor:
    """``bandwidth`` as a tensor; a number, NumPy's included, takes the dtype and device of ``like``, float32 for half.

    Raises:
        ValueError: a number ≤ 0. TypeError: neither a number nor floating point.
    """
    if isinstance(bandwidth, np.ndarray) and bandwidth.ndim == 0:
        bandwidth = bandwidth[()]
    if not isinstance(bandwidth, int | float | np.integer | np.floating):
        bandwidth = as_float_tensor(bandwidth, "bandwidth")
        return bandwidth.to(computing_dtype(bandwidth.dtype))
    if not bandwidth > 0.0:
        raise ValueError(f"bandwidth: a number > 0 expected, got {bandwidth}")
    return torch.full((), float(bandwidth), dtype=computing_dtype(like.dtype), device=like.device)


def exactly_one(**values: Any) -> tuple[str, Any]:
    given = [item for item in values.items() if item[1] is not None]
    if len(given) != 1:
        names = " and ".join(name for name, _ in given)
        raise ValueError(f"exactly one of {', '.join(values)} expected, got {names or 'none'}")
    return given[0]


def check_covariance_shape(name: str, covariance: Tensor, means: Tensor) -> None:
    k, d = means.shape[-2:]
    if name == "variances":
        form = "(*batch, K or 1, D or 1)"
        fits = covariance.ndim >= 2 and covariance.shape[-2] in (1, k) and covariance.shape[-1] in (1, d)
    else:
        form = "(*batch, K or 1, D, D)"
        fits = covariance.ndim >= 3 and covariance.shape[-3] in (1, k) and covariance.shape[-2:] == (d, d)
    if not fits:
        raise ValueError(
            f"{name}: {form} with K = {k}, D = {d} expected, "
            f"got {tuple(covariance.shape)} for means {tuple(means.shape)}"
        )


def checked_means(means: Any) -> Tensor:
    means = as_float_tensor(means, "means")
    if means.ndim < 2:
        raise ValueError(f"means: (*batch, K, D) expected, got {tuple(means.shape)}")
    if 0 in means.shape[-2:]:
        raise ValueError(f"means: at least one component and one dimension expected, got {tuple(means.shape)}")
    return means


def checked_weights(means: Tensor, **kinds: Any) -> dict[str, Tensor]:
    """The fields of the weights, of which one kind is given or none."""
    given = {name: t for name, t in kinds.items() if t is not None}
    if not given:
        return {}
    if len(given) > 1 and (list(given) != ["weights", "log_weights"] or not _are_logarithms(*given.values())):
        raise ValueError(f"at most one of {', '.join(kinds)} expected, got {' and '.join(given)}")
    name, t = next(iter(given.items()))
    t = as_float_tensor(t, name)
    if t.ndim < 1 or t.shape[-1] != means.shape[-2]:
        raise ValueError(
            f"{name}: (*batch, K) with K = {means.shape[-2]} expected, "
            f"got {tuple(t.shape)} for means {tuple(means.shape)}"
        )
    if name == "log_weights":
        return {name: t}
    if name == "logits":
        return {"log_weights": normalised(t)}
    t = t.to(computing_dtype(torch.promote_types(t.dtype, means.dtype)))  # before the logarithm rounds
    return {"weights": t, "log_weights": log_of_weights(t)}


def _are_logarithms(weights: Any, log_weights: Any) -> bool:
    """Whether both are the fields of one mixture, as dataclasses.replace passes them, maybe rounded by a cast."""
    tensors = (weights, log_weights)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors) or weights.shape != log_weights.shape:
        return False
    rounding = 4.0 * max(torch.finfo(t.dtype).eps for t in tensors)
    logarithms, found = weights.detach().double().log(), log_weights.detach().double()
    return not has_values(weights) or torch.allclose(logarithms, found, rounding, rounding, equal_nan=True)


def check_devices(parameters: dict[str, Tensor]) -> None:
    device = parameters["means"].device
    for t in parameters.values():
        if t.device != device:
            raise ValueError(f"parameters on one device expected, got {device} and {t.device}")


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def check_factors(p: GaussianMixture) -> None:
    """Raises ValueError unless every covariance of a component that has a weight is positive definite, every factor
    invertible and the diagonal of every scale_tril positive."""
    if p.scale_tril is not None:
        bad = ~(p.scale_tril.detach().diagonal(dim1=-2, dim2=-1) > 0)
        _refuse(p, bad.any(-1) if bool(bad.any()) else None, "scale_tril: a positive diagonal expected", "has none")
    if p.factor is not None:
        bad = torch.linalg.slogdet(p.factor.detach().double()).sign.abs() != 1.0
        _refuse(p, bad, "factor: invertible matrices expected", "is not")
    if p.covariance_matrix is not None:
        s = p.covariance_matrix.detach().double()  # the precision that kernels factor in
        tolerance = 1e3 * torch.finfo(p.covariance_matrix.dtype).eps * s.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
        bad = ~((s - s.mT).abs().amax((-2, -1)) <= tolerance)
        _refuse(p, bad, "covariance_matrix: symmetric matrices expected", "is not")
        _refuse(p, torch.linalg.cholesky_ex(s).info != 0, "covariance_matrix: positive definite expected", "is not")


def _refuse(p: GaussianMixture, bad: Tensor | None, expected: str, what: str) -> None:
    """Raises ValueError for the first component with a weight that is ``bad``, (*batch, K or 1)."""
    if bad is None or not bool(bad.any()):
        return
    if p.log_weights is not None:
        counts = p.log_weights != -math.inf
        counts = counts.any(-1, keepdim=True) if bad.shape[-1] == 1 else counts
        bad = bad & counts
    if bool(bad.any()):
        raise ValueError(f"{expected}, component {_first(bad)} {what}")


def check_values(p: GaussianMixture) -> None:
    """Raises ValueError naming the first bad value."""
    for name in ("means", "variances", "scale_tril", "factor", "covariance_matrix"):
        t = getattr(p, name)
        if t is not None and bool((bad := ~t.isfinite()).any()):
            raise ValueError(f"{name}: finite values expected, got {t[_first(bad)].item()} at index {_first(bad)}")
    if p.variances is not None and bool((bad := p.variances < 0).any()):
        value = p.variances[_first(bad)].item()
        raise ValueError(f"variances: values >= 0 expected, got {value} at index {_first(bad)}")
    if p.weights is not None and bool((bad := ~((p.weights >= 0.0) & p.weights.isfinite())).any()):
        value = p.weights[_first(bad)].item()
        raise ValueError(f"weights: finite values >= 0 expected, got {value} at index {_first(bad)}")
    if p.log_weights is not None:
        if p.weights is None and _are_shares(p.log_weights):
            raise ValueError("log_weights: logarithms expected, got values >= 0 that sum to 1: pass them as weights=")
        bad = p.log_weights.isnan() | (p.log_weights == math.inf)
        if bool(bad.any()):
            value = p.log_weights[_first(bad)].item()
            raise ValueError(f"log_weights: values below +inf expected, got {value} at index {_first(bad)}")
        bad = (p.log_weights == -math.inf).all(-1)
        if bool(bad.any()):
            raise ValueError(f"log_weights: a component of positive weight expected, none in mixture {_first(bad)}")


def _are_shares(t: Tensor) -> bool:
    """Whether all values are ≥ 0 and sum to one in every mixture, as probabilities do; logarithms hardly ever would."""
    sums = t.sum(-1, dtype=torch.float64)
    return t.shape[-1] > 1 and bool((t >= 0.0).all()) and bool(((sums - 1.0).abs() < 1e-3).all())
