"""Random combinations of switches: each trains as its twin on one process, or is refused as it is built."""

import re

import pytest
from switches import combinations, outcome, twin

ERROR = 1e-10
ALL, FEW = 300, 12


def try_combination(run_ranks, case):
    """`trains`, or why not; raises AssertionError where it is neither right nor refused by name."""
    try:
        expected = twin(case)
    except Exception as error:  # options that contradict each other leave no twin; it must be refused
        expected = None
        why = str(error)
    result = run_ranks(2, outcome, case, expected)[0]
    if isinstance(result, str):
        assert result.startswith("Megatron: ") or re.search(r"--[a-z]+", result), f"names nothing: {result}"
        return result
    assert expected is not None, why
    error, name = result.worst if result.gradients else (0.0, "")
    assert result.loss <= ERROR, case
    assert error <= ERROR, (name, str(case))
    return "trains"


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=() if i < FEW else pytest.mark.slow) for i in range(ALL)]
)
def test_combination_trains_as_its_twin_or_is_refused_by_name(run_ranks, number):
    case = combinations(number + 1)[number]
    print(case)
    print(try_combination(run_ranks, case))
