"""Modules that return or take mixtures, wrapped as torch wraps them for two processes; also the processes' program.

`python distributed_cases.py FILE RANK` trains every case for two steps and saves the averaged gradients of each.
"""

import datetime
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import csdiv
from csdiv import GaussianMixture
from csdiv.nn import CSDivergenceLoss, GaussianMixturePrior, SelfOverlapExpansion

STEPS, RANKS = 2, 2


class Encoder(nn.Module):
    """A mixture of 3 components for each row of x (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.log_variances = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> GaussianMixture:
        shape = (len(x), 3, 2)
        return GaussianMixture(self.means(x).view(shape), self.log_variances(x).view(shape).exp())


class FactorEncoder(nn.Module):
    """The same with factors and linear weights."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.factors, self.log_weights = nn.Linear(4, 6), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> GaussianMixture:
        factors, weights = torch.eye(2) + 0.1 * self.factors(x).view(len(x), 3, 2, 2), self.log_weights(x).exp()
        return GaussianMixture(self.means(x).view(len(x), 3, 2), factor=factors, weights=weights)


class Unused(nn.Module):
    """A prior with a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.unused = GaussianMixturePrior(5, 2), nn.Linear(3, 3)

    def forward(self) -> dict[str, GaussianMixture]:
        return {"prior": self.prior()}


class Model(nn.Module):
    """Encoder, prior and what takes their mixtures, each of which may be wrapped for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prior, self.head = Encoder(), GaussianMixturePrior(5, 2), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x), self.prior())


class Expanded(nn.Module):
    """A model that computes its prior's self term at every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prior, self.self_overlap = Encoder(), GaussianMixturePrior(5, 2), SelfOverlapExpansion(2)

    def forward(self, x: Tensor) -> Tensor:
        q, p = self.encoder(x), self.prior()
        means, log_variances = q.means.flatten(0, 1), q.variances.log().flatten(0, 1)
        return csdiv.cs_regularizer(means, log_variances, p, prior_self_overlap=self.self_overlap(p)).mean()


class Head(nn.Module):
    """The divergence of two mixtures, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, q: GaussianMixture, p: GaussianMixture) -> Tensor:
        return (self.scale * CSDivergenceLoss("none")(q, p)).mean()


def data(rank: int, step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def prior_loss(module: nn.Module, x: Tensor) -> Tensor:
    p = module()
    p = p["prior"] if isinstance(p, dict) else p
    return csdiv.cs_divergence(GaussianMixture(x[:, :2], x[:, 2:].exp()), p)


def encoder_loss(module: nn.Module, x: Tensor) -> Tensor:
    return csdiv.cs_divergence(module(x), GaussianMixture(torch.zeros(1, 2), torch.ones(1, 1))).mean()


def model_loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def autocast_loss(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return encoder_loss(module, x)


def ddp(**options: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda module: DistributedDataParallel(module, **options)


def fsdp2(*inner: str, **options: object) -> Callable[[nn.Module], nn.Module]:
    """fully_shard of these submodules, then of the whole."""

    def wrap(module: nn.Module) -> nn.Module:
        for name in inner:
            fully_shard(module.get_submodule(name), **options)
        return fully_shard(module, **options)

    return wrap


def fsdp1(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Callable[[nn.Module, Tensor], Tensor]]
CASES: dict[str, Case] = {}
for _name, _module, _loss in (
    ("prior", lambda: GaussianMixturePrior(5, 2), prior_loss),
    ("encoder", Encoder, encoder_loss),
    ("factor encoder", FactorEncoder, encoder_loss),
):
    CASES |= {
        f"{_name}, DDP": (_module, ddp(), _loss),
        f"{_name}, DDP find_unused_parameters": (_module, ddp(find_unused_parameters=True), _loss),
        f"{_name}, DDP static_graph": (_module, ddp(static_graph=True), _loss),
        f"{_name}, FSDP1": (_module, fsdp1, _loss),
        f"{_name}, FSDP2": (_module, fsdp2(), _loss),
        f"{_name}, FSDP2 bfloat16": (_module, fsdp2(mp_policy=BFLOAT16), _loss),
    }
_PARTS = ("encoder", "prior", "head")
CASES |= {
    "encoder, DDP autocast": (Encoder, ddp(), autocast_loss),
    "unused, DDP find_unused_parameters": (Unused, ddp(find_unused_parameters=True), prior_loss),
    "unused, FSDP2": (Unused, fsdp2("prior"), prior_loss),
    "model, DDP": (Model, ddp(), model_loss),
    "model, FSDP2": (Model, fsdp2(), model_loss),
    "model of parts, FSDP2": (Model, fsdp2(*_PARTS, reshard_after_forward=True), model_loss),
    "model of parts, FSDP2 bfloat16": (Model, fsdp2(*_PARTS, mp_policy=BFLOAT16), model_loss),
    "expanded self overlap, DDP": (Expanded, ddp(), model_loss),
    "expanded self overlap, FSDP2": (Expanded, fsdp2("encoder", "prior"), model_loss),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]()


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By parameter, whatever wrapped the module."""
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            return gradients(module.module)
    named = [(name.removeprefix("module."), p.grad) for name, p in module.named_parameters()]
    return {name: whole(grad) for name, grad in named if grad is not None}


def trained(name: str, rank: int) -> list[dict[str, Tensor]]:
    """Gradients of each step."""
    module = CASES[name][1](made(name))
    optimizer, steps = torch.optim.SGD(module.parameters(), 0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        CASES[name][2](module, data(rank, step)).backward()
        steps.append(gradients(module))
        optimizer.step()
    return steps


def prior_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(t) for name, t in GaussianMixturePrior(5, 2).state_dict().items()}


def reloaded(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """A prior's state as one process holds it, after it went into a wrapped prior with other values and out again."""
    options, state, module = StateDictOptions(full_state_dict=True), prior_state(), wrap(GaussianMixturePrior(5, 2))
    set_model_state_dict(module, dict(state), options=options)
    assert all(torch.equal(whole(p), state[n.removeprefix("module.")]) for n, p in module.named_parameters())
    return get_model_state_dict(module, options=options)


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"init_method": f"file://{file}.store", "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, **options)
    found: dict[str, object] = {}
    for name in CASES:
        try:
            found[name] = trained(name, rank)
        except Exception as error:  # the test of this case shows it
            found[name] = f"{type(error).__name__}: {error}"
    found["state"] = [reloaded(wrap) for wrap in (ddp(), fsdp2())]
    torch.save(found, f"{file}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
