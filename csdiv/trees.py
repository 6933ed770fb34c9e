"""Mixtures as trees of tensors, which ``torch.func``, ``torch.export`` and ``torch.distributed`` take apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from csdiv.mixture import GaussianMixture


def register(cls: type[GaussianMixture], fields: Sequence[str]) -> None:
    """Makes values of ``cls`` nodes, whose leaves are the fields that there are."""

    def flatten(mixture: GaussianMixture) -> tuple[list[Any], str]:
        names = [name for name in fields if getattr(mixture, name) is not None]
        return [getattr(mixture, name) for name in names], " ".join(names)

    def unflatten(values: Any, names: str) -> GaussianMixture:
        return cls._unchecked(**dict(zip(names.split(), values, strict=True)))

    def flatten_with_keys(mixture: GaussianMixture) -> tuple[list[tuple[Any, Any]], str]:
        values, names = flatten(mixture)
        return [(pytree.GetAttrKey(name), t) for name, t in zip(names.split(), values, strict=True)], names

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"csdiv.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
