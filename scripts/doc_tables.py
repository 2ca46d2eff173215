"""Write the tables of README and docs that are made from the sources.

python scripts/doc_tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`:

    options    docs/options.md    the fields of MHCConfig
    hooks      docs/hooks.md      hooks/targets.py
    matrix     docs/support.md    tests/support_matrix.py, and docs/results/support, where its tests ran
    works      README.md          the same: a line for each group, names without notes
    simulated  docs/schedules.md  pipeline/simulate.py, its default times
    costs      README.md          step*.json of the newest folder in docs/results that has any
    memory     README.md          recompute/estimate.py, of recipes in examples/
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import support_runs  # noqa: E402
from support_matrix import FEATURES, GROUPS, REFUSED, UNTESTED, YES, Feature  # noqa: E402

from megatron_mhc.config import MHCConfig, flag, takes  # noqa: E402


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, where a cell's | is \\|, in code too."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


def options() -> str:
    """Every option: default, values, meaning."""
    return table(["`--mhc-...`", "default", "takes", "meaning"], map(_option, fields(MHCConfig)))


def _option(option: Field[Any]) -> list[str]:
    words = takes(option).removeprefix("one of ")
    for choice in option.metadata["choices"]:
        words = re.sub(rf"\b{choice}\b", f"`{choice}`", words)
    default = option.default
    if option.type == "bool":
        words, default = f"nothing; `{option.name}=true` in MEGATRON_MHC", "off"
    meaning = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", option.metadata["help"])
    return [f"`{flag(option.name).removeprefix('--mhc-')}`", f"`{default}`", words, meaning]


def hooks() -> str:
    """Every symbol of Megatron's that is replaced, when, and why."""
    from megatron_mhc.hooks.targets import BRIDGE_HOOKS, FSDP_HOOKS, HOOKS, SCHEDULE_HOOKS, TRAINING_HOOKS

    every = (*HOOKS, *TRAINING_HOOKS, *SCHEDULE_HOOKS, *FSDP_HOOKS, *BRIDGE_HOOKS)
    rows = [[*_target(hook.target), hook.reason] for hook in every]
    return table(["symbol", "module", "why"], rows)


def _target(target: str) -> tuple[str, str]:
    module, _, name = target.partition(":")
    return f"`{name}`", f"`{module}`"


def matrix() -> str:
    """Where the tests ran; by group, every feature: its state, how far it goes, what shows it."""
    runs = support_runs.runs()
    text = "".join(map(_run, runs))
    for group in GROUPS:
        rows = (_feature(one, runs) for one in FEATURES if one.group == group)
        text += f"\n## {_capital(group)}\n\n" + table(["", "state", "", "shown by"], rows)
    return text


def _capital(group: str) -> str:
    return group[0].upper() + group[1:]


def _run(run: support_runs.Run) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in run["versions"].items() if found)
    source = f"[{run['kind']}](results/support/{run['file']})"
    return f"- {source}: {run['device']}, {run['date']}, commit {run['commit']}, {versions}\n"


def _feature(feature: Feature, runs: list[support_runs.Run]) -> list[str]:
    links = []
    for test in feature.tests:
        file, _, name = test.partition("::")
        links.append(f"[{name.removeprefix('test_')}](../tests/{file})")
    state, why = support_runs.state(feature, runs)
    if why and feature.state == REFUSED:
        state = f"{REFUSED}, {state}"
    notes = [note for note in (feature.note.replace("](docs/", "]("), why) if note]
    return [feature.name, state, "; ".join(notes), ", ".join(links)]


def works() -> str:
    """Every group: the names of its features by state."""
    runs = support_runs.runs()
    rows = []
    for group in GROUPS:
        names: dict[str, list[str]] = {}
        for one in FEATURES:
            if one.group == group:
                state = support_runs.state(one, runs)[0]
                names.setdefault(REFUSED if one.state == REFUSED else state, []).append(one.name)
        yes, not_shown, untested, refused = (
            " · ".join(names.get(state, ())) for state in (YES, support_runs.NOT_SHOWN, UNTESTED, REFUSED)
        )
        untested = untested and f"untested: {untested}"
        more = " · ".join(filter(None, (not_shown, untested)))
        link = f"[{group}](docs/support.md#{group.replace(' ', '-')})"
        rows.append([link, yes, more, refused])
    return table(["", "yes", "not shown, or untested", "refused"], rows)


def simulated() -> str:
    """A step of the paper's 27B under every schedule, ms, on 8 stages of 2 and of 4 chunks."""
    from megatron_mhc.pipeline.simulate import Plan, Times, schedules

    columns = ("step", "bubble", "all_to_all", "p2p")
    runs = {vpp: schedules(Plan(8, vpp, 32, layers=4 // vpp, replay=True), Times()) for vpp in (2, 4)}
    head = [f"vpp {vpp}: {name.replace('_', '-')}" for vpp in runs for name in columns]
    rows = (
        [name, *(f"{getattr(runs[vpp][name], column):.0f}" for vpp in runs for column in columns)]
        for name in runs[2]
    )
    return table(["", *head], rows)


def costs() -> str:
    """Steps with mHC over vanilla's, of one machine and commit: `benchmarks.step`'s rows."""
    measured = {file.parent for file in (ROOT / "docs" / "results").glob("*_*/step*.json")}
    folder = max(measured, key=lambda path: path.name[-10:])
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("step*.json"))]
    head = reports[0]
    if any((report["device"], report["commit"]) != (head["device"], head["commit"]) for report in reports):
        raise ValueError(f"{folder}: steps of several devices or commits; the table needs one of each")
    versions = ", ".join(f"{name} {found}" for name, found in head["versions"].items() if found)
    source = f"[{folder.name}](docs/results/{folder.name})"
    about = f"{head['device']}, {head['date']}, commit {head['commit']}, {versions}; raw data: {source}.\n\n"
    found = {(row["section"], row["name"]): row for report in reports for row in report["rows"]}
    columns = ["recipe", "microbatch", "vanilla, ms", "mHC, ms", "over vanilla", "with `auto` recompute"]
    columns += ["runs apart", "reserved, GiB: vanilla", "mHC", "`auto`"]
    rows = list(_costs(found))
    used = [i for i, _ in enumerate(columns) if any(row[i] != "-" for row in rows)]
    return about + table([columns[i] for i in used], ([row[i] for i in used] for row in rows))


def _costs(found: dict[tuple[str, str], Any]) -> Iterable[list[str]]:
    over, apart = "wall_ms over vanilla, %", "apart, %"
    for (section, name), vanilla in found.items():
        batch, _, form = name.partition(", ")
        if form != "vanilla" or "wall_ms" not in vanilla:
            continue
        mhc, auto = (found.get((section, f"{batch}, {form}"), {}) for form in ("mhc", "mhc/auto"))
        if over in mhc:
            forms = vanilla, mhc, auto
            spread = [row[apart] for row in forms if apart in row]
            yield [
                section,
                batch.removeprefix("micro-batch "),
                f"{vanilla['wall_ms']:.0f}",
                f"{mhc['wall_ms']:.0f}",
                f"**{mhc[over]:+.1f} %**",
                f"{auto[over]:+.1f} %" if over in auto else "-",
                f"{max(spread):.0f} %" if spread else "-",
                *(f"{row['reserved_MiB'] / 2**10:.1f}" if "reserved_MiB" in row else "-" for row in forms),
            ]


def memory() -> str:
    """Activations of recipes: vanilla, mHC and its recompute; in a process that may take a CPU for a GPU."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        rows = pool.map(_memory, (("llama-1b", 1, 1), ("llama-1b", 4, 1), ("3b", 4, 1), ("27b", 1, 2)))
    return table(["recipe", "microbatch", "vanilla, GiB", "mHC, GiB", "with `auto` recompute, GiB"], rows)


def _memory(of: tuple[str, int, int]) -> list[str]:
    from megatron_mhc import command_line
    from megatron_mhc.recompute.estimate import ranks

    recipe, batch, stages = of
    variables = dict(DATA="mock", DRY_RUN="1", GPUS_PER_NODE="8", MBS=str(batch), PP=str(stages))
    words = ["bash", str(ROOT / "examples" / "train.sh"), recipe, "mhc"]
    done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, check=True)
    command = command_line.take_apart(shlex.split(done.stdout))
    args, config, mhc = command_line.parse(command.arguments, command.world)
    mhc = dataclasses.replace(mhc, recompute_layer_num="auto")
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    found = ranks(config, mhc, args.seq_length, args.micro_batch_size, micro_batches)
    values = zip(*((r.vanilla, r.mhc(), r.with_blocks("auto")) for r in found), strict=True)
    layout = "one stage" if stages == 1 else f"the fullest of {stages} stages"
    return [f"{recipe}, {layout}", f"{batch}", *(f"{max(column) / 2**30:.1f}" for column in values)]


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "options": ("docs/options.md", options),
    "hooks": ("docs/hooks.md", hooks),
    "matrix": ("docs/support.md", matrix),
    "works": ("README.md", works),
    "costs": ("README.md", costs),
    "memory": ("README.md", memory),
    "simulated": ("docs/schedules.md", simulated),
}


def filled(page: str, name: str, text: str) -> str:
    """A page with `text` between the markers of `name`.

    Raises:
        ValueError: the page has not exactly one such pair.
    """
    pair = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page, count = pair.subn(lambda found: found[1] + text + found[2], page)
    if count != 1:
        raise ValueError(f"{count} pairs of <!-- {name} --> and <!-- /{name} -->, expected one")
    return page


def main() -> None:
    """Fill all tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from megatron_mhc.testing import cpu

    cpu.install()  # the hooks import Megatron
    for name, (file, make) in TABLES.items():
        path = ROOT / file
        path.write_text(filled(path.read_text(), name, make()))


if __name__ == "__main__":
    main()
