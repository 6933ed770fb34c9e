"""Gaussian mixtures as immutable values: constructors, checks, and methods that call csdiv.functional."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csdiv import conversions, samples, sampling, trees
from csdiv.checks import (
    as_float_tensor,
    check_covariance_shape,
    check_devices,
    check_factors,
    check_values,
    checked_means,
    checked_weights,
    exactly_one,
    log_of_weights,
    normalised,
    shares,
)
from csdiv.shapes import broadcast
from csdiv.transforms import has_values

if TYPE_CHECKING:
    from torch.distributions import Distribution, MixtureSameFamily

MATRICES = ("scale_tril", "factor", "covariance_matrix")
EVENT_DIMS = {"means": 2, "variances": 2, "weights": 1, "log_weights": 1} | dict.fromkeys(MATRICES, 3)
"""The tensors of a mixture, and their dimensions beside those of the batch."""
_FIELDS = tuple(EVENT_DIMS)
_NOTHING: dict[str, Any] = dict.fromkeys(_FIELDS)


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
        means = checked_means(means)
        name, covariance = exactly_one(
            variances=variances, scale_tril=scale_tril, factor=factor, covariance_matrix=covariance_matrix
        )
        covariance = as_float_tensor(covariance, name)
        check_covariance_shape(name, covariance, means)
        values = {"means": means, name: covariance}
        if log_weights is not None or weights is not None or logits is not None:
            values.update(checked_weights(means, weights=weights, log_weights=log_weights, logits=logits))
        self._set(_NOTHING | values)
        try:
            _ = self.batch_shape
        except RuntimeError:
            shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in values.items())
            raise ValueError(f"batch shapes do not broadcast: {shapes}") from None
        check_devices(values)
        if (validate or (variances is None and means.device.type == "cpu")) and has_values(means):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> GaussianMixture:
        computed = () if self.weights is None else ("log_weights",)
        values = {n: t for n in _FIELDS if n not in computed and (t := getattr(self, n)) is not None}
        copied = copy.deepcopy(values, memo)
        if self.weights is not None:  # of which the logarithms are no leaf, which torch would not copy
            copied["log_weights"] = log_of_weights(copied["weights"])
        return self._unchecked(**copied)

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
        spread = (self.variances, 2) if self.variances is not None else (self.matrices, 3)
        for t, event_dims in (spread, (self.log_weights, 1)):
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
        values = {name: getattr(self, name) for name in _FIELDS} | {"log_weights": normalised(self.log_weights)}
        if self.weights is not None:
            weights = shares(self.weights)
            values.update(weights=weights, log_weights=log_of_weights(weights))
        return self._unchecked(**values)

    @classmethod
    def from_distribution(cls, distribution: Distribution) -> GaussianMixture:
        """The mixture of a ``torch.distributions`` object; gradients reach its parameters.

        Weights given as probabilities, zeros included, are read as such. What is expanded in memory is shared: a scale
        or a covariance of all components is tied.

        Args:
            distribution: ``Independent(Normal(...), n)``, ``MultivariateNormal`` or ``LowRankMultivariateNormal`` with
                batch (*batch,), which becomes means (*batch, 1, D); or ``MixtureSameFamily`` of one of them or of a
                ``Normal``, with batch (*batch, K). n event dimensions are flattened to D, none are D = 1; a ``Normal``
                on its own has no batch dimensions. Low rank becomes a Cholesky factor.

        Raises:
            ValueError: a ``Normal`` with batch dimensions that is not wrapped in ``Independent(..., 1)``.
            TypeError: any other distribution.
        """
        return cls(**conversions.distribution_parameters(distribution))

    def to_distribution(self) -> MixtureSameFamily:
        """The same mixture, its weights normalised, as a ``torch.distributions.MixtureSameFamily`` of batch (*batch,).

        Components are ``Independent(Normal(...), 1)`` or ``MultivariateNormal``; gradients reach this one's tensors.
        Raises: ValueError: from torch, for a variance that is not positive.
        """
        return conversions.to_distribution(self)

    @classmethod
    def from_sklearn(cls, estimator: Any) -> GaussianMixture:
        """The mixture of scikit-learn's fitted ``GaussianMixture``, ``BayesianGaussianMixture`` or ``KernelDensity``.

        A covariance type gives the structure: "full" (K, D, D), "tied" (1, D, D), "diag" (K, D), "spherical" (K, 1).
        A density estimate has a Gaussian kernel and Euclidean distances. Values are copied; see :meth:`to`.

        Of a ``BayesianGaussianMixture`` it is the plug-in estimate, the mixture of ``weights_``, ``means_`` and
        ``covariances_`` that its ``sample`` draws from. Its ``score_samples`` differs by tenths of nats where they
        have few samples, and is no log density: it takes expectations over the posterior.

        Raises: TypeError: not such an object. ValueError: not fitted, another kernel or metric.
        """
        return cls(**conversions.sklearn_parameters(estimator))

    @classmethod
    def from_scipy(cls, density: Any) -> GaussianMixture:
        """The mixture of a ``scipy.stats.gaussian_kde``: tied full, its kernel's covariance at each sample; a copy.

        Raises: TypeError: not such an object.
        """
        return cls(**conversions.scipy_parameters(density))

    def to_sklearn(self) -> Any:
        """The same mixture, its weights normalised, as a fitted ``sklearn.mixture.GaussianMixture``.

        The covariance type is "full", "tied", "diag" (also for tied diagonal) or "spherical" (also for tied spherical).

        Raises:
            ImportError: scikit-learn is not installed. ValueError: a batch of mixtures, or a covariance that is not
            positive definite.
        """
        return conversions.to_sklearn(self)

    @classmethod
    def from_samples(
        cls,
        x: Tensor,
        bandwidth: float | Tensor | str | None = None,
        *,
        bandwidth_matrix: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> GaussianMixture:
        """Kernel density estimate: a Gaussian of standard deviation ``bandwidth`` at each sample.

        A pair of samples then has the variance 2h²: for a kernel written as exp(−|x − y|²/2σ²), h is σ/√2.

        Args:
            x: (*batch, n, D) samples, n ≥ 1.
            bandwidth: h > 0, a number or a tensor (); or (*batch, n or 1, D or 1), at least 2-dimensional as variances;
                or a rule, applied to each item of the batch, for n ≥ 2. "scott": h_d = σ_d n^(−1/(D + 4)), "silverman":
                h_d = σ_d (n (D + 2)/4)^(−1/(D + 4)), with the standard deviation σ_d of dimension d; in one dimension
                these are SciPy's. "median": h = σ/√2 with the median σ of the distances between two samples, or between
                two of 1 000 samples if there are more. Weights count, with n = (Σw)²/Σw².
            bandwidth_matrix: instead, (*batch, D, D), the covariance of the Gaussian at every sample, as in SciPy and
                statsmodels: of variances, not of standard deviations.
            weights: (*batch, n) ≥ 0, normalised; default 1/n each.

        Gradients: to each of the tensors; a rule is taken as a constant.

        Raises:
            ValueError: shapes that do not fit, a number h ≤ 0, an unknown rule, or on the CPU one that gives 0.
            TypeError: not floating point.

        Source: Scott, "Multivariate density estimation", Wiley 1992, section 6.3.1; Silverman, "Density estimation for
        statistics and data analysis", 1986, section 4.3.2; Gretton et al., "A kernel two-sample test", JMLR 13, 2012.
        """
        return cls(**samples.density_parameters(x, bandwidth, bandwidth_matrix, weights))

    # methods that compute: csdiv.functional is imported when they are called

    def log_prob(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """log Σ_k w_k N(x; μ_k, S_k) for points x (*batch, n, D); shape (*batch, n), nats. Memory O((n + K) D)."""
        from csdiv import functional

        return functional.log_prob(x, self, backend=backend)

    def pointwise_log_prob(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """The log density of each mixture of the batch at its own point, as ``torch.distributions`` has it.

        For a mixture density network, whose batch (B,) has one target each: x (B, D) gives (B,), where
        ``log_prob(x)`` takes the B points as those of every mixture and gives (B, B).

        Args:
            x: (*batch, D), one point for each mixture; batch dimensions broadcast.

        Returns:
            (*batch,) nats. Gradients, memory and errors: as :meth:`log_prob`.
        """
        from csdiv import functional

        return functional.pointwise_log_prob(x, self, backend=backend)

    def responsibilities(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """Posterior weight of each component for points x (*batch, n, D) or for the components of a mixture.

        Shape (*batch, n, K), rows sum to one; components whose density is infinite share a row equally. Logits are
        rounded to the dtype, with full covariances to float64. Materialises (*batch, n, K): for the index alone see
        :meth:`assign`.
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

        Raises: TypeError: n is not an integer. ValueError: n is negative.
        """
        with torch.no_grad():
            return self.rsample(n)

    def rsample(self, n: int) -> Tensor:
        """n draws, shape (*batch, n, D), with gradients to the mean and covariance of each drawn component.

        The choice of the component is not reparametrised: no gradient reaches the weights.
        """
        return sampling.rsample(self, n)


def _restore(values: dict[str, Tensor]) -> GaussianMixture:
    return GaussianMixture._unchecked(**values)


trees.register(GaussianMixture, _FIELDS)
torch.serialization.add_safe_globals([_restore])  # torch.load's weights_only=True
