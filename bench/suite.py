"""csdiv's own times under pytest-benchmark, so that commits can be compared: ``make bench-suite``.

python -m pytest bench/suite.py --benchmark-json=now.json
python -m bench compare before.json now.json
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import CPU_CASES, Case, make_inputs
from .peers import Csdiv


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", CPU_CASES, ids=[case.name for case in CPU_CASES])
def test_time(case: Case, direction: str, benchmark: BenchmarkFixture) -> None:
    inputs = make_inputs(case)
    benchmark(getattr(Csdiv("cpu", case.entry), direction), inputs)
