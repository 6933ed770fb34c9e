"""Two processes: the gradients that torch averages are the mean of each process's own."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_cases as cases
import pytest
import torch
from torch import Tensor

import csdiv

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found."""
    file = tmp_path_factory.mktemp("distributed") / "found"
    command = [sys.executable, cases.__file__, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(csdiv.__file__).parent.parent)}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(cases.RANKS)]
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * cases.RANKS
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(cases.RANKS)]


def expected(name: str) -> list[dict[str, Tensor]]:
    """The mean over processes of the gradients, step by step, without torch.distributed."""
    replicas, steps = [cases.made(name) for _ in range(cases.RANKS)], []
    for step in range(cases.STEPS):
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            cases.CASES[name][2](replica, cases.data(rank, step)).backward()
        own = [cases.gradients(replica) for replica in replicas]
        steps.append({key: torch.stack([grads[key] for grads in own]).mean(0) for key in own[0]})
        for replica in replicas:
            for key, parameter in replica.named_parameters():
                if key in steps[-1]:
                    parameter.data -= 0.1 * steps[-1][key]
    return steps


@pytest.mark.parametrize("name", cases.CASES)
def test_gradients_are_the_mean_over_processes(name: str, found: list[dict]) -> None:
    rounded = 2.0**-5 if "bfloat16" in name or "autocast" in name else 1e-5
    steps = expected(name)
    for rank in range(cases.RANKS):
        assert isinstance(found[rank][name], list), found[rank][name]
        for own, step in zip(found[rank][name], steps, strict=True):
            assert set(step) <= set(own)
            for key, grad in own.items():
                mean = step.get(key, torch.zeros_like(grad))  # a parameter that is not used
                close(grad, mean, rtol=rounded, atol=rounded * float(mean.abs().max()))
    own = cases.made(name)
    cases.CASES[name][2](own, cases.data(0, 0)).backward()
    ratios = [(g - steps[0][k]).abs().max() / steps[0][k].abs().max() for k, g in cases.gradients(own).items()]
    assert max(ratios) > 5.0 * rounded  # so that one process's own gradients would not pass


def test_state_goes_in_and_out_of_wrapped_priors(found: list[dict]) -> None:
    state = cases.prior_state()
    for side in found[0]["state"]:
        assert set(side) == set(state)
        assert all(torch.equal(side[name], t) for name, t in state.items())
