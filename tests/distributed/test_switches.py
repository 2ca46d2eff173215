"""Random combinations of switches: each trains as its twin on one process, or is refused as it is built."""

from pathlib import Path

import pytest
from switched import tried
from switches import SEED, combinations, digest

ALL, FEW = 300, 12
LIST = Path(__file__).resolve().parents[2] / "docs" / "results" / "support" / "switches.tsv"


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=() if i < FEW else pytest.mark.slow) for i in range(ALL)]
)
def test_combination_trains_as_its_twin_or_is_refused_by_name(run_ranks, number):
    case = combinations(number + 1)[number]
    print(case)
    print(tried(case, run_ranks))


def test_the_list_says_of_every_combination_what_it_did():
    """`python tests/distributed/switched.py 0 300 docs/results/support/switches.tsv` writes it."""
    head, *lines = LIST.read_text().splitlines()
    assert head.startswith(f"# seed {SEED}, combinations {digest(ALL)}; ")
    for number, (line, case) in enumerate(zip(lines, combinations(ALL), strict=True)):
        assert line.split("\t")[:5] == [str(number), case.layout, case.kind, case.how, case.trained]
        assert line.split("\t")[5].startswith(("trains", "refused: ", "Megatron: "))
