"""The simulator's view of the rank that pipeline.py measured, from the results.json that it wrote; no torch.

    python scripts/bench/pipeline_model.py runs/pipeline/results.json

Prints for every run the step and its parts, measured and simulated: with all that is modelled, and without
one thing or the other. Nothing that is simulated here was taken from the step that it is compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mhc.pipeline.costs import (  # noqa: E402
    APART,
    AWAIT,
    COPY,
    IN,
    KERNEL,
    OUT,
    REPORT,
    Costs,
    Machine,
    Phase,
)
from megatron_mhc.pipeline.megatron_order import megatron_program  # noqa: E402
from megatron_mhc.pipeline.program import Message, Op, Plan, build_program  # noqa: E402
from megatron_mhc.pipeline.simulate import simulate  # noqa: E402

Row = dict[str, Any]
WITHOUT = {  # columns of `pipeline_model.py` and comm_tables.py: what is left out of the model
    "simulated": {},
    "links apart": {"shared": False},
    "host ahead": {"host": False},
    "neither": {"shared": False, "host": False, "kernels": False},
}
PARTS = {  # measured in `pipeline.run` as well: steps without messages, and without all-to-alls too
    "without messages": {"messages": False},
    "without both": {"messages": False, "exchange": False},
}


def kind(op: Op) -> str:
    return f"{op.kind} {op.what}"


def plan_of(settings: Row, order: str, boundary: str) -> Plan:
    """The plan of a run, from the arguments of pipeline.py."""
    return Plan(
        settings["pp"],
        settings["vpp"],
        settings["microbatches"],
        boundary=boundary,
        fused=order == "fused",
        layers=settings["layers"],
        replay=settings["replay"] != "off",
    )


def program_of(plan: Plan, order: str, rank: int) -> list[Op]:
    return megatron_program(plan, rank) if order == "megatron" else build_program(plan, rank)


class Rank(Costs):
    """What one rank's operations cost, as its measurements have it.

    Args:
        link: what standins.Link measured.
        inputs: `phases`, `host` and `lead` of the run, see timeline.py.
        shared: all-to-alls and reports go over the link of the messages.
        host: the host takes its time, and waits.
        kernels: those of several streams share the GPU.
        messages, exchange: False for the step without them.
    """

    def __init__(
        self,
        link: Row,
        inputs: Row,
        plan: Plan,
        order: str,
        rank: int,
        *,
        shared: bool = True,
        host: bool = True,
        kernels: bool = True,
        messages: bool = True,
        exchange: bool = True,
    ):
        self._link, self._inputs, self._pp, self._rank = link, inputs, plan.pp, rank
        self._shared, self._messages, self._exchange = shared, messages, exchange
        waits = any(phase[0] == AWAIT for phases in inputs["phases"].values() for phase in phases)
        self.machine = Machine(
            host=host,
            late=order == "megatron",
            # A host that waits for the device in every layer is never far ahead of it.
            ahead=None if waits else inputs["lead"],
            kernels=kernels and plan.fused,
            one_channel=True,
            turns=link["turns"].get("high" if plan.fused else "normal", COPY),
            both_ways=link["both ways"],
        )

    def compute(self, plan: Plan, op: Op) -> float:
        return sum(phase.ms for phase in self.phases(plan, op))

    def phases(self, plan: Plan, op: Op) -> Sequence[Phase]:
        return [self._phase(*phase) for phase in self._inputs["phases"].get(kind(op), [(KERNEL, 0.0, 0.0)])]

    def _phase(self, what: str, ms: float, host: float) -> Phase:
        if what == REPORT:
            queues = self._shared and self._link["report behind a message"] > self._longest() / 2
            return Phase(REPORT, self._link["report"] if queues else 0.0, host)
        if what in (OUT, IN, APART):
            return Phase(what if self._shared else APART, ms if self._exchange else 0.0, host)
        return Phase(what, ms, host)

    def _longest(self) -> float:
        return max(ways[OUT] for ways in self._link["alone"].values())

    def transfer(self, message: Message) -> tuple[float, int]:
        if not self._messages:
            return 0.0, 1
        arrives = message.receiver % self._pp == self._rank
        ms = self._link["alone"][message.name][IN if arrives else OUT]
        return ms, self.machine.slices(ms)

    def host(self, op: Op) -> float:
        return self._inputs["host"].get(op.kind, 0.0)


def simulated(report: Row, name: str, inputs: Row) -> Row:
    """Simulated steps of one run: of the whole model, of parts of the model, and of parts of the step."""
    settings, (order, boundary) = report["arguments"], name.split()
    plan, rank = plan_of(settings, order, boundary), settings["rank"]
    program = program_of(plan, order, rank)
    found = {}
    for column, how in (WITHOUT | PARTS).items():
        costs = Rank(report["link"], inputs, plan, order, rank, **how)
        found[column] = simulate(plan, costs, [program], alone=True).step
    return found


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit(__doc__)
    for path in paths:
        report = json.loads(Path(path).read_text())
        print(f"{path}: ms measured, then simulated, of the step and of its parts")
        print(f"{'':20}{'step':>9}", *(f"{name:>17}" for name in (*WITHOUT, *PARTS)))
        for name, run in report["runs"].items():
            if "inputs" not in run:
                continue
            found = simulated(report, name, run["inputs"])
            cells = [f"{found[column]:9.1f}  {found[column] / run['step']:5.2f} " for column in WITHOUT]
            cells += [f"{run[column]:8.1f} {found[column]:8.1f}" for column in PARTS]
            print(f"{name:20}{run['step']:9.1f}", *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
