"""What a data set holds, as lists to compare."""

import torch

from csdiv.models import Dataset
from csdiv.models.data import Split


def numbered(n: int, features: int = 3) -> torch.Tensor:
    """Rows that tell which sample they are."""
    return torch.arange(n, dtype=torch.float32).unsqueeze(-1).expand(n, features)


def splits(data: Dataset) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def sizes(data: Dataset) -> tuple[int, ...]:
    return tuple(len(part.x) for part in splits(data))


def identities(data: Dataset) -> list[list[int]]:
    return [part.x[:, 0].long().tolist() for part in splits(data)]
