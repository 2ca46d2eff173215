"""What --mhc-log-interval costs: training steps that are all logged beside some that never are, in one call.

    python -m benchmarks.diagnostics --out diagnostics.json [--model llama-1b] [--interval 100]

Jobs as in `benchmarks.step`: `off` with --mhc-log-interval 0, `between` under the hook at steps that are not
logged, `logged` at steps that all are, with hooks, reduction, copy to the host and TensorBoard. What a logged
step adds does not grow with the number of micro-batches, since only the first is sampled; at an interval of K
it is spread over K steps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Report, command_line
from benchmarks.jobs import Job, Turns, recipe, take_turns, tiny

FORMS = {"off": "0", "between": "1000000", "logged": "1"}


def main(argv: list[str] | None = None) -> None:
    parser = command_line("diagnostics", __doc__)
    add = parser.add_argument
    add("--out", type=Path)
    add("--logs", type=Path, help="folder for the jobs' logs")
    add("--model", default="llama-1b")
    add("--interval", type=int, default=100, help="K")
    for name, default in (("micro-batch", 2), ("warm-up", 4), ("turns", 4), ("steps", 4)):
        add("--" + name, type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(argv)
    apart = ("out", "logs")
    report = Report(options.out, "diagnostics", {k: v for k, v in vars(options).items() if k not in apart})
    if not report.row("logging", "logged"):
        batch = ["--micro-batch-size", str(options.micro_batch), "--mhc-recompute-layer-num", "off"]
        batch += ["--global-batch-size", str(4 * options.micro_batch)]
        with tempfile.TemporaryDirectory() as events:
            jobs = []
            for name, interval in FORMS.items():
                arguments = tiny("mhc") if options.tiny else recipe(options.model, "mhc")
                arguments += [*batch, "--mhc-log-interval", interval, "--tensorboard-dir", f"{events}/{name}"]
                jobs.append(Job(name, arguments))
            turns = Turns(options.warm_up, options.turns, options.steps)
            rows = take_turns(jobs, turns, options.logs)
        if off := rows["off"].get("wall_ms"):
            for name in ("between", "logged"):
                if "wall_ms" in rows[name]:
                    rows[name]["adds_ms"] = added = rows[name]["wall_ms"] - off
                    share = added / off / (options.interval if name == "logged" else 1)
                    rows[name][f"share at K={options.interval}, %"] = 100 * share
        for name, row in rows.items():
            report.add("logging", name, row)
    report.end()


if __name__ == "__main__":
    main()
