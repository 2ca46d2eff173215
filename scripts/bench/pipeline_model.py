"""The simulator's view of the rank that pipeline.py measured, from the results.json that it wrote; no torch.

    python scripts/bench/pipeline_model.py runs/pipeline/results.json [runs/pipeline/events.json]

Prints for every run the step and its parts, measured and simulated: with all that is modelled, and without
one thing or the other. Nothing that is simulated there was taken from the step that it is compared with.
With events.json, which has one noted step of each run, two columns more. "one step's messages": the median of
the other steps, and the simulation with the median times that messages of each name took in the noted one,
for a link that others use too is not the same a minute later. "replayed": the noted step, and its simulation
that is told how long in it the host took and every message: what then still differs is the model's own error,
and no disturbance of that step.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from megatron_mhc.pipeline.simulate import simulate  # noqa: E402
from megatron_mhc.schedule.program import COMPUTE, POST, SEND, Message, Op, Plan, build_program  # noqa: E402

Row = dict[str, Any]
Noted = dict[str, list[list[Any]]]  # of one step, as timeline.raw writes it
SIZES = ("streams", "mixed", "d_streams"), ("write", "d_write")  # messages of one size
MARKS = 0.01  # ms; no more than that lies between two marks with nothing between them
WITHOUT = {  # columns of `pipeline_model.py` and comm_tables.py: what is left out of the model
    "simulated": {},
    "links apart": {"shared": False},
    "host ahead": {"host": False},
    "neither": {"shared": False, "host": False, "kernels": False},
}
NOTED = "one step's messages", "replayed"  # columns of both: what a noted step tells
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
        link = settled(link)
        self.plan, self._link, self._inputs, self._rank = plan, link, inputs, rank
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
        return Phase(what, ms if ms > MARKS else 0.0, host)

    def _longest(self) -> float:
        return max(ways[OUT] for ways in self._link["alone"].values())

    def transfer(self, message: Message) -> tuple[float, int]:
        if not self._messages:
            return 0.0, 1
        ms = self._link["alone"][message.name][self._way(message)]
        return ms, self.machine.slices(ms)

    def _way(self, message: Message) -> str:
        return IN if message.receiver % self.plan.pp == self._rank else OUT

    def host(self, op: Op) -> float:
        return self._inputs["host"].get(op.kind, 0.0)


def settled(link: Row) -> Row:
    """What was measured of the link, where messages of one size count as one that was measured repeatedly."""
    alone, before = dict(link["alone"]), sum(link["alone"]["streams"].values())
    for names in SIZES:
        ways = {way: statistics.median(link["alone"][name][way] for name in names) for way in (OUT, IN)}
        alone |= dict.fromkeys(names, ways)
    # It was divided by the time of one message; the largest, and of them the first, is "streams".
    return link | {"alone": alone, "both ways": link["both ways"] * before / sum(alone["streams"].values())}


def host_phases(noted: Noted) -> Iterator[tuple[Op, list[list[Any]]]]:
    """Every compute operation but the last, with [kind, ms of the host] of its phases."""
    operations, parts, *_ = noted.values()
    inside = defaultdict(list)
    for number, *part in parts:
        inside[number].append(part)
    for number, (*op, _, at, _) in enumerate(operations[:-1]):
        if op[0] not in COMPUTE:
            continue
        left = operations[number + 1][5]
        rows: list[list[Any]] = []
        for what, _, _, start, end in inside[number]:
            if not rows or start != at:
                rows.append([KERNEL, start - at])
            rows.append([what, end - start])
            at = end
        yield Op(*op), [*rows, [KERNEL, left - at]]


def unhurried(inputs: Row, steps: Sequence[Noted]) -> Row:
    """Inputs with the host's times of `steps` where those are smaller.

    A host that has let the device end everything starts slowly into the next operation; one that runs ahead
    may wait for room in the device's queue. Either can only add to its own time.
    """
    found: dict[tuple[str, tuple[str, ...]], list[list[float]]] = defaultdict(list)
    for noted in steps:
        for op, rows in host_phases(noted):
            found[kind(op), tuple(what for what, _ in rows)].append([ms for _, ms in rows])
    phases = {}
    for name, known in inputs["phases"].items():
        rows = found[name, tuple(what for what, *_ in known)] or [[host for *_, host in known]]
        other = [statistics.median(column) for column in zip(*rows, strict=True)]
        # Of a phase that waits nothing is known.
        phases[name] = [
            [what, ms, 0.0 if what in (REPORT, AWAIT) else min(host, also)]
            for (what, ms, host), also in zip(known, other, strict=True)
        ]
    return inputs | {"phases": phases}


def moved_in(noted: Noted) -> dict[tuple[str, str], list[float]]:
    """Milliseconds that the messages of each name and way took in a step."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    *_, copies = noted.values()
    for name, way, start, end in copies:
        found[name, way].append(end - start)
    return found


class Crowded(Rank):
    """A rank whose messages take what those of their name did in one noted step, among all others."""

    def __init__(self, noted: Noted, *args: Any):
        super().__init__(*args)
        self._typical = {which: statistics.median(times) for which, times in moved_in(noted).items()}
        self.machine = replace(self.machine, both_ways=1.0)  # which these times have in them

    def transfer(self, message: Message) -> tuple[float, int]:
        ms = self._typical[message.name, self._way(message)]
        return ms, self.machine.slices(ms)


class Replayed(Rank):
    """A rank in one noted step: the host's times and the messages' are that step's own."""

    def __init__(self, noted: Noted, program: list[Op], *args: Any):
        super().__init__(*args)
        operations, *_ = noted.values()
        ends = [came for *_, came, _, _ in operations[1:]] + [operations[-1][6]]
        self._took = {Op(*row[:5]): end - row[6] for row, end in zip(operations, ends, strict=True)}
        self._hosts = {op: [ms for what, ms in rows if what != AWAIT] for op, rows in host_phases(noted)}
        moved, ways = moved_in(noted), {POST: IN, SEND: OUT}
        self._moved = {op.message: moved[op.what, ways[op.kind]].pop(0) for op in program if op.kind in ways}
        self.machine = replace(self.machine, both_ways=1.0)

    def phases(self, plan: Plan, op: Op) -> Sequence[Phase]:
        known = super().phases(plan, op)
        hosts = iter(self._hosts.get(op, [phase.host for phase in known if phase.kind != AWAIT]))
        return [phase if phase.kind == AWAIT else phase._replace(host=next(hosts)) for phase in known]

    def transfer(self, message: Message) -> tuple[float, int]:
        ms = self._moved[message]
        return ms, self.machine.slices(ms)

    def host(self, op: Op) -> float:
        return self._took[op]


def own_streams(order: str) -> list[str]:
    """The steps without messages, as events.json names them, whose host does what the step's host does."""
    return ["without messages"] if order == "fused" else ["without messages", "on one stream"]


def described(report: Row, name: str, inputs: Row) -> tuple[list[Op], tuple[Row, Row, Plan, str, int]]:
    """The program of a run, and the arguments of its Rank."""
    settings, (order, boundary) = report["arguments"], name.split()
    plan, rank = plan_of(settings, order, boundary), settings["rank"]
    return program_of(plan, order, rank), (report["link"], inputs, plan, order, rank)


def step_of(costs: Rank, program: list[Op]) -> float:
    return simulate(costs.plan, costs, [program], alone=True).step


def from_one_step(report: Row, name: str, inputs: Row, times: Sequence[float], noted: Noted) -> Row:
    """Measured and simulated steps, of what the last one noted; `times` are of all.

    NOTED[0]: the other steps' median, and the simulation with the messages' times of the noted one; NOTED[1]:
    the noted one, and the simulation with all that it noted.
    """
    program, known = described(report, name, inputs)
    others = statistics.median(times[:-1] or times)
    return {
        NOTED[0]: [others, step_of(Crowded(noted, *known), program)],
        NOTED[1]: [times[-1], step_of(Replayed(noted, program, *known), program)],
    }


def simulated(report: Row, name: str, inputs: Row) -> Row:
    """Simulated steps of one run: of the whole model, of parts of the model, and of parts of the step."""
    program, known = described(report, name, inputs)
    costs = {column: Rank(*known, **how) for column, how in (WITHOUT | PARTS).items()}
    return {column: step_of(each, program) for column, each in costs.items()}


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit(__doc__)
    events: Row = {}
    for path in (path for path in paths if Path(path).name == "events.json"):
        events = json.loads(Path(path).read_text())
    for path in (path for path in paths if Path(path).name != "events.json"):
        report = json.loads(Path(path).read_text())
        print(f"{path}: ms measured, then simulated, of the step and of its parts")
        columns = [*WITHOUT, *PARTS, *(NOTED if events else [])]
        print(f"{'':20}{'step':>9}", *(f"{name:>19}" for name in columns))
        for name, run in report["runs"].items():
            if "inputs" not in run:
                continue
            found = simulated(report, name, run["inputs"])
            cells = [f"{found[column]:11.1f}  {found[column] / run['step']:5.2f} " for column in WITHOUT]
            cells += [f"{run[column]:10.1f} {found[column]:8.1f}" for column in PARTS]
            if name in events:
                one = from_one_step(report, name, run["inputs"], run["steps"]["step"], events[name]["step"])
                cells += [f"{measured:10.1f} {model:8.1f}" for measured, model in one.values()]
            print(f"{name:20}{run['step']:9.1f}", *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
