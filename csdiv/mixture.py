"""Gaussian mixtures as immutable values: constructors, checks, and methods that call csdiv.functional."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from csdiv import conversions, sampling
from csdiv.checks import (
    as_bandwidth,
    as_float_tensor,
    check_covariance_shape,
    check_devices,
    check_factors,
    check_values,
    exactly_one,
)
from csdiv.shapes import broadcast
from csdiv.transforms import full_like_device, has_values

if TYPE_CHECKING:
    from torch.distributions import Distribution, MixtureSameFamily

EVENT_DIMS = {
    "means": 2,
    "variances": 2,
    "weights": 1,
    "log_weights": 1,
    "scale_tril": 3,
    "factor": 3,
    "covariance_matrix": 3,
}
"""The tensors of a mixture, and their dimensions beside those of the batch."""
_FIELDS = tuple(EVENT_DIMS)
MATRICES = _FIELDS[4:]
_WEIGHTS = ("weights", "log_weights", "logits")


@dataclass(init=False, eq=False, repr=False, frozen=True)  # torch.distributed looks through dataclasses for tensors
class GaussianMixture:
    """A Gaussian mixture Σ_k w_k N(μ_k, S_k), or a batch of them: a light immutable value.

    The tensors stay the caller's own, and gradients flow to them. Batch dimensions of the parameters broadcast.
    The shape of the covariance *is* its structure, and picks the kernel. ``torch.save`` writes it, and ``torch.load``
    reads it, with ``weights_only=True`` as well once this class has been imported.

    ``GaussianMixture(means)`` with means (B, D) is *one* mixture of B components, not B posteriors: for the
    divergence of each of B Gaussians from a prior see :func:`csdiv.cs_regularizer`.

    Args:
        means: (*batch, K, D), float16 to float64; NumPy arrays are accepted everywhere.
        variances: at least 2-dimensional, ≥ 0: (*batch, K, D) diagonal, (K, 1) spherical, (1, D) tied diagonal,
            (1, 1) tied spherical. Zero is a point; a negative one makes every result NaN.
        weights: (*batch, K) ≥ 0, used as given: unnormalised mixtures (intensities) are meaningful. A component of
            weight zero counts nothing, whatever its parameters; the gradient to its weight is the derivative there
            (second derivatives take it as absent). A negative weight makes every result NaN.
        log_weights: (*batch, K), used as given. −inf is a component of weight zero, without gradients, so ragged
            mixtures are padded with −inf.
        logits: (*batch, K), normalised with log_softmax. At most one of ``weights``, ``log_weights`` and ``logits`` is
            given. Default: uniform, 1/K each.
        scale_tril: (*batch, K, D, D) or (1, D, D) tied: Cholesky factors R, S = R Rᵀ, with a positive diagonal. Only
            their lower triangles are read, and have gradients.
        factor: (*batch, K, D, D) or (1, D, D) tied: any square R with S = R Rᵀ, rotations times scales for example.
        covariance_matrix: (*batch, K, D, D) or (1, D, D) tied: symmetric, positive definite.
            Exactly one of ``variances``, ``scale_tril``, ``factor`` and ``covariance_matrix`` is given. Factors are
            not multiplied out where that would lose digits: against points, and between two sides of one covariance.
        validate: also check values, naming the first bad index. Off by default, since it waits for a GPU.

    Raises:
        TypeError: a parameter that is not a floating-point tensor.
        ValueError: shapes that do not fit, parameters on different devices, none or two covariances, two kinds of
            weights; on the CPU, or with ``validate``, a factor or covariance that is not positive definite.
        NotImplementedError: sparse, quantised and nested tensors.

    Example:
        >>> p = GaussianMixture(torch.randn(500, 16), torch.rand(500, 16) + 0.1)
        >>> p.num_components, p.dim, p.batch_shape, p.structure
        (500, 16, torch.Size([]), 'diagonal')
    """

    __slots__ = (*_FIELDS, "__weakref__")

    means: Tensor
    variances: Tensor | None
    weights: Tensor | None
    log_weights: Tensor | None  # the logarithms of weights, if these were given
    scale_tril: Tensor | None
    factor: Tensor | None
    covariance_matrix: Tensor | None

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        log_weights: Tensor | None = None,
        logits: Tensor | None = None,
        scale_tril: Tensor | None = None,
        factor: Tensor | None = None,
        covariance_matrix: Tensor | None = None,
        validate: bool = False,
    ) -> None:
        means = as_float_tensor(means, "means")
        if means.ndim < 2:
            raise ValueError(f"means: (*batch, K, D) expected, got {tuple(means.shape)}")
        if 0 in means.shape[-2:]:
            raise ValueError(f"means: at least one component and one dimension expected, got {tuple(means.shape)}")
        covariances = {
            "variances": variances,
            "scale_tril": scale_tril,
            "factor": factor,
            "covariance_matrix": covariance_matrix,
        }
        name, covariance = exactly_one(**covariances)
        covariance = as_float_tensor(covariance, name)
        check_covariance_shape(name, covariance, means)
        values = dict.fromkeys(_FIELDS)
        values.update(means=means)
        values[name] = covariance
        given = [(n, t) for n, t in zip(_WEIGHTS, (weights, log_weights, logits), strict=True) if t is not None]
        if given:
            values.update(_checked_weights(given, means))
        self._set(values)
        try:
            _ = self.batch_shape
        except RuntimeError:
            shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in values.items() if v is not None)
            raise ValueError(f"batch shapes do not broadcast: {shapes}") from None
        check_devices(*self._tensors())
        checked = validate or (variances is None and means.device.type == "cpu")
        if checked and has_values(means):
            check_factors(self)
            if validate:
                check_values(self)

    # construction without checks, and immutability

    def _set(self, values: dict[str, Any]) -> None:
        for name in _FIELDS:
            object.__setattr__(self, name, values[name])

    @classmethod
    def _unchecked(cls, **values: Tensor | None) -> GaussianMixture:
        self = object.__new__(cls)
        self._set(dict.fromkeys(_FIELDS) | values)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, ({name: t for name in _FIELDS if (t := getattr(self, name)) is not None},)

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return (
            f"GaussianMixture(num_components={self.num_components}, dim={self.dim}, {self.structure}{batch}, "
            f"{self.means.dtype}, {self.means.device})"
        )

    # description

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[-2]

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast batch shape of all parameters."""
        shape = self.means.shape[:-2]
        for t, event_dims in ((self.variances, 2), (self.log_weights, 1), (self.matrices, 3)):
            if t is not None and t.shape[:-event_dims] != shape:
                shape = broadcast(shape, t.shape[:-event_dims])
        return shape

    @property
    def matrices(self) -> Tensor | None:
        """Full covariances as they were given, (*batch, K or 1, D, D): Cholesky factors, factors or covariances."""
        return next((t for t in (self.scale_tril, self.factor, self.covariance_matrix) if t is not None), None)

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of all parameters."""
        dtype = self.means.dtype
        for t in self._tensors():
            if t.dtype != dtype:
                dtype = torch.promote_types(dtype, t.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def structure(self) -> str:
        """ "diagonal", "spherical", "tied diagonal", "tied spherical", "full" or "tied full"."""
        if (matrices := self.matrices) is not None:
            return "tied full" if matrices.shape[-3] == 1 and self.num_components > 1 else "full"
        assert self.variances is not None
        tied = "tied " if self.variances.shape[-2] == 1 and self.num_components > 1 else ""
        return tied + ("spherical" if self.variances.shape[-1] == 1 and self.dim > 1 else "diagonal")

    def _tensors(self) -> list[Tensor]:
        return [t for name in _FIELDS if (t := getattr(self, name)) is not None]

    # other values made from this one

    def map(self, function: Callable[[Tensor], Tensor]) -> GaussianMixture:
        """The mixture with ``function`` applied to each of its tensors; shapes must be kept."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return self._unchecked(**{n: None if t is None else function(t) for n, t in values.items()})

    def to(self, *args: Any, **kwargs: Any) -> GaussianMixture:
        """As ``torch.Tensor.to``, for every parameter."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def detach(self) -> GaussianMixture:
        """The same values without gradients."""
        return self.map(torch.Tensor.detach)

    def normalized(self) -> GaussianMixture:
        """The mixture with its weights scaled to sum to one."""
        if self.log_weights is None:
            return self
        values = {name: getattr(self, name) for name in _FIELDS} | {"log_weights": self.log_weights.log_softmax(-1)}
        if self.weights is not None:
            shares = self.weights / self.weights.sum(-1, keepdim=True)
            values.update(weights=shares, log_weights=log_of_weights(shares))
        return self._unchecked(**values)

    @classmethod
    def from_distribution(cls, distribution: Distribution) -> GaussianMixture:
        """The mixture of a ``torch.distributions`` object; gradients reach its parameters.

        Args:
            distribution: ``Independent(Normal(...), 1)``, ``MultivariateNormal`` or ``LowRankMultivariateNormal`` with
                batch (*batch,), which becomes means (*batch, 1, D); ``MixtureSameFamily`` of one of them, with batch
                (*batch, K); or a ``Normal`` without batch dimensions, D = 1.

        Raises:
            ValueError: a ``Normal`` with batch dimensions that is not wrapped in ``Independent(..., 1)``.
            TypeError: any other distribution.
        """
        return cls(**conversions.distribution_parameters(distribution))

    def to_distribution(self) -> MixtureSameFamily:
        """The same mixture, its weights normalised, as a ``torch.distributions.MixtureSameFamily`` of batch (*batch,).

        Components are ``Independent(Normal(...), 1)`` or ``MultivariateNormal``; gradients reach this one's tensors.

        Raises:
            ValueError: from torch, for a variance that is not positive.
        """
        return conversions.to_distribution(self)

    @classmethod
    def from_sklearn(cls, mixture: Any) -> GaussianMixture:
        """The mixture of a fitted ``sklearn.mixture.GaussianMixture`` or ``BayesianGaussianMixture``.

        Its covariance type gives the structure: "full" (K, D, D), "tied" (1, D, D), "diag" (K, D), "spherical" (K, 1).
        Values are copied, in scikit-learn's dtype; see :meth:`to`.

        Raises:
            TypeError: not such an object. ValueError: not fitted.
        """
        return cls(**conversions.sklearn_parameters(mixture))

    def to_sklearn(self) -> Any:
        """The same mixture, its weights normalised, as a fitted ``sklearn.mixture.GaussianMixture``.

        The covariance type is "full", "tied", "diag" (also for tied diagonal) or "spherical" (also for tied spherical).

        Raises:
            ImportError: scikit-learn is not installed. ValueError: a batch of mixtures, or a covariance that is not
            positive definite.
        """
        return conversions.to_sklearn(self)

    @classmethod
    def from_samples(cls, x: Tensor, bandwidth: float | Tensor, *, weights: Tensor | None = None) -> GaussianMixture:
        """Kernel density estimate: a Gaussian of standard deviation ``bandwidth`` at each sample.

        A pair of samples then has the variance 2h²: for a kernel written as exp(−|x − y|²/2σ²), h is σ/√2.

        Args:
            x: (*batch, n, D) samples, n ≥ 1.
            bandwidth: h > 0, a number or a tensor (); or (*batch, n or 1, D or 1), at least 2-dimensional as variances.
            weights: (*batch, n) ≥ 0, normalised; default 1/n each.

        Gradients: to each of them.

        Raises:
            ValueError: shapes that do not fit, or a number h ≤ 0. TypeError: not floating point.
        """
        x = as_float_tensor(x, "x")
        if x.ndim < 2 or 0 in x.shape[-2:]:
            raise ValueError(f"x: (*batch, n, D) with n and D of at least 1 expected, got {tuple(x.shape)}")
        bandwidth = as_bandwidth(bandwidth, x)
        if bandwidth.ndim == 1:
            raise ValueError(f"bandwidth: () or (*batch, n or 1, D or 1) expected, got {tuple(bandwidth.shape)}")
        variances = torch.where(bandwidth < 0.0, math.nan, bandwidth).square()
        variances = variances if bandwidth.ndim else variances.view(1, 1)
        if weights is None:
            return cls(x, variances)
        weights = as_float_tensor(weights, "weights")
        if weights.ndim < 1 or weights.shape[-1] != x.shape[-2]:
            raise ValueError(f"weights: (*batch, n) with n = {x.shape[-2]} expected, got {tuple(weights.shape)}")
        return cls(x, variances, weights=weights / weights.sum(-1, keepdim=True))

    # methods that compute: csdiv.functional is imported when they are called

    def log_prob(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """log Σ_k w_k N(x; μ_k, S_k) for points x (*batch, n, D); shape (*batch, n), nats. Memory O((n + K) D)."""
        from csdiv import functional

        return functional.component_log_overlap(functional.points(x), self, backend=backend)

    def responsibilities(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """Posterior weight of each component for points x (*batch, n, D) or for the components of a mixture.

        Shape (*batch, n, K), rows sum to one. Materialises (*batch, n, K): for the index alone see :meth:`assign`.
        """
        from csdiv import functional

        return functional.responsibilities(x, self, backend=backend)

    def assign(self, x: Tensor | GaussianMixture, *, backend: str = "auto") -> Tensor:
        """The component of largest posterior weight, argmax_k of log w_k + log N(μ_i; μ_k, S_i + S_k).

        Args:
            x: points (*batch, n, D), or a mixture whose n components (posterior codes, say) are assigned.

        Returns:
            (*batch, n) int64, without the (n, K) matrix; the lowest index where several are equal.
        """
        from csdiv import functional

        return functional.assign(x, self, backend=backend)

    def sample(self, n: int) -> Tensor:
        """n independent draws, shape (*batch, n, D), without gradients. Weights are normalised for this.

        Half precision draws in float32. Mixtures without a component of positive weight give NaN.

        Raises:
            TypeError: n is not an integer. ValueError: n is negative.
        """
        with torch.no_grad():
            return self.rsample(n)

    def rsample(self, n: int) -> Tensor:
        """n draws, shape (*batch, n, D), with gradients to the mean and covariance of each drawn component.

        The choice of the component is not reparametrised: no gradient reaches the weights.
        """
        return sampling.rsample(self, n)


class Points(GaussianMixture):
    """Points x (*batch, n, D) as components of zero variance; n may be 0."""

    __slots__ = ()

    def __init__(self, x: Tensor) -> None:
        self._set(dict.fromkeys(_FIELDS) | {"means": x, "variances": full_like_device(x, (1, 1), 0.0)})

    @property
    def structure(self) -> str:
        return "points"


def _checked_weights(given: list[tuple[str, Tensor]], means: Tensor) -> dict[str, Tensor]:
    """The fields of the weights; half precision ends here."""
    if len(given) > 1:
        names = [name for name, _ in given]
        if names != ["weights", "log_weights"] or not _are_logarithms(*(t for _, t in given)):
            raise ValueError(f"at most one of {', '.join(_WEIGHTS)} expected, got {' and '.join(names)}")
    name, weights = given[0]
    weights = as_float_tensor(weights, name)
    if weights.ndim < 1 or weights.shape[-1] != means.shape[-2]:
        raise ValueError(
            f"{name}: (*batch, K) with K = {means.shape[-2]} expected, "
            f"got {tuple(weights.shape)} for means {tuple(means.shape)}"
        )
    if name == "log_weights":
        return {name: weights}
    wide = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    if name == "logits":
        return {"log_weights": wide.log_softmax(-1)}
    return {"weights": wide, "log_weights": log_of_weights(wide)}


def _are_logarithms(weights: Any, log_weights: Any) -> bool:
    """Whether both are the fields of one mixture, as dataclasses.replace passes them, maybe rounded by a cast."""
    tensors = (weights, log_weights)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors) or weights.shape != log_weights.shape:
        return False
    rounding = 4.0 * max(torch.finfo(t.dtype).eps for t in tensors)
    logarithms, found = weights.detach().double().log(), log_weights.detach().double()
    return not has_values(weights) or torch.allclose(logarithms, found, rounding, rounding, equal_nan=True)


def log_of_weights(weights: Tensor) -> Tensor:
    """log w, −inf at zero, whose gradient there is zero: csdiv.weights adds what is missing."""
    absent = weights == 0.0
    return torch.where(absent, -math.inf, torch.where(absent, 1.0, weights).log())


def _restore(values: dict[str, Tensor]) -> GaussianMixture:
    return GaussianMixture._unchecked(**values)


def _flatten(mixture: GaussianMixture) -> tuple[list[Any], None]:
    return [getattr(mixture, name) for name in _FIELDS], None


def _unflatten(values: Any, context: None) -> GaussianMixture:
    return GaussianMixture._unchecked(**dict(zip(_FIELDS, values, strict=True)))


def _flatten_with_keys(mixture: GaussianMixture) -> tuple[list[tuple[Any, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(mixture, name)) for name in _FIELDS], None


pytree.register_pytree_node(
    GaussianMixture,
    _flatten,
    _unflatten,
    serialized_type_name="csdiv.GaussianMixture",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([_restore])  # torch.load's weights_only=True
