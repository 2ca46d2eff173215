"""Train a small GPT with mHC and the same GPT without it, on text that every machine has.

    python examples/quickstart/run.py          (or `bash scripts/quickstart.sh`, which installs first)

Both go through Megatron's own `pretrain()`, with the same data and seed. All results are written to
runs/quickstart/: data/, and per model log.txt, train.sh, tensorboard/; for mHC also checkpoint/,
resume.sh and exported/; and quickstart.png.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from settings import ROOT, Machine, data_arguments
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NAMES = {"mhc": "GPT with mHC", "plain": "GPT without mHC"}
ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) .*lm loss: ([0-9.E+-]+)")
VALIDATION = re.compile(
    r"validation loss at iteration (\d+)( on validation set)? \| lm loss value: ([0-9.E+-]+)"
)


class StepFailed(Exception):
    """A step of the quickstart failed; the message says which, and where its log is."""


def write_script(path: Path, command: list[str]) -> None:
    """Write a command as a shell script that runs from anywhere."""
    lines = " \\\n    ".join(shlex.join(pair) for pair in _pairs(command))
    path.write_text(f"""#!/bin/bash
set -e
cd {shlex.quote(str(ROOT))}
export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH="$PWD:$PYTHONPATH"
{lines} "$@"
""")


def _pairs(words: list[str]) -> list[list[str]]:
    """Group each --flag with its values, one line of a script each."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return lines


def run(script: Path, log: Path, name: str, bar: tqdm | None = None) -> dict[str, list]:
    """Run a script, keep its output in `log` and read the losses off it.

    Returns:
        `train` and `validation`, lists of (iteration, loss), and `final`, the last validation loss.

    Raises:
        StepFailed: the script ended with an error; its last lines are printed.
    """
    losses: dict[str, list] = {"train": [], "validation": [], "final": []}
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if found := ITERATION.search(line):
                    losses["train"].append((int(found[1]), float(found[3])))
                    if bar is not None:
                        bar.set_postfix_str(f"loss {float(found[3]):.3f}", refresh=False)
                        bar.update(int(found[1]) - bar.n)
                elif found := VALIDATION.search(line):
                    kind = "final" if found[2] else "validation"
                    losses[kind].append((int(found[1]), float(found[3])))
        except BaseException:
            process.terminate()  # Ctrl-C: torchrun ends its ranks
            process.wait()
            raise
    if process.wait() != 0:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr)
        raise StepFailed(
            f"{name} failed (exit status {process.returncode}); the end of its log is above, all in {log}"
        )
    return losses


def train(kind: str, machine: Machine, steps: int, out: Path) -> dict[str, list]:
    """Train one of the two models from scratch, showing a progress bar."""
    folder = out / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    common = machine.launch(["-m", "megatron_mhc.pretrain_gpt"]) + machine.arguments()
    common += ["--pipeline-model-parallel-size", str(machine.processes)]
    common += data_arguments(out / "data" / "stdlib")
    common += ["--log-interval", "1", "--eval-iters", "10", "--eval-interval", str(max(steps // 4, 1))]
    common += ["--lr-decay-iters", str(steps), "--tensorboard-dir", str(folder / "tensorboard")]
    if kind == "plain":
        common += ["--no-mhc"]
    else:
        common += ["--save", str(folder / "checkpoint"), "--save-interval", str(steps)]
        common += ["--mhc-log-interval", str(max(steps // 20, 1))]
    write_script(folder / "train.sh", common + ["--train-iters", str(steps)])
    if kind == "mhc":
        more = ["--train-iters", str(2 * steps), "--load", str(folder / "checkpoint")]
        write_script(folder / "resume.sh", common + more + ["--use-checkpoint-opt-param-scheduler"])
    form = "{desc} {percentage:3.0f}% |{bar}| {n}/{total} [{elapsed} elapsed, {remaining} left{postfix}]"
    seconds = 0.3 if sys.stderr.isatty() else 20
    with tqdm(total=steps, desc=f"{NAMES[kind]:15}", bar_format=form, mininterval=seconds) as bar:
        return run(folder / "train.sh", folder / "log.txt", f"training the {NAMES[kind]}", bar)


def measure_gains(machine: Machine, out: Path) -> None:
    """Load the mHC checkpoint into one process, whatever it was trained on, and measure its mappings."""
    folder = out / "mhc"
    command = machine.launch([str(HERE / "gains.py"), str(out / "gains.json")], processes=1)
    command += machine.arguments() + data_arguments(out / "data" / "stdlib")
    command += ["--load", str(folder / "checkpoint"), "--no-load-optim", "--no-load-rng", "--skip-train"]
    command += ["--train-iters", "1", "--eval-iters", "1", "--eval-interval", "1"]
    write_script(out / "gains.sh", command)
    run(out / "gains.sh", out / "gains.log", "measuring the composite mapping")


def exports() -> bool:
    """Whether transformers is here, of a version that loads what is exported; it brings safetensors."""
    try:
        return int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        return False


def export_and_sample(out: Path) -> str:
    """Export the mHC checkpoint for transformers, and a line that the exported model says."""
    folder = out / "mhc"
    words = ["--load", str(folder / "checkpoint"), "--out", str(folder / "exported")]
    write_script(folder / "export.sh", [sys.executable, "-m", "megatron_mhc.export", *words])
    run(folder / "export.sh", folder / "export.log", "exporting the checkpoint")
    line = folder / "sample.txt"
    write_script(
        folder / "sample.sh", [sys.executable, str(HERE / "sample.py"), str(folder / "exported"), str(line)]
    )
    run(folder / "sample.sh", folder / "sample.log", "sampling from the exported model")
    return line.read_text()


def quickstart(machine: Machine, steps: int, out: Path) -> None:
    """Prepare the text, train both models, plot, export, sample, and say where everything is."""
    started = time.time()
    out.mkdir(parents=True, exist_ok=True)
    print(f"training on {machine}, {steps} steps each, results in {out}")
    text = out / "data" / "stdlib"
    if not text.with_suffix(".idx").exists():
        write_script(out / "data.sh", [sys.executable, str(HERE / "prepare_text.py"), str(text)])
        run(out / "data.sh", out / "data.log", "preparing the text")
    losses = {kind: train(kind, machine, steps, out) for kind in NAMES}
    (out / "losses.json").write_text(json.dumps(losses))
    print("measuring the gain of the composite mapping ...", flush=True)
    measure_gains(machine, out)
    write_script(out / "plot.sh", [sys.executable, str(HERE / "report.py"), str(out)])
    run(out / "plot.sh", out / "plot.log", "plotting")
    print("exporting the checkpoint, and sampling from what is exported ...", flush=True)
    line = export_and_sample(out)

    print(f"\ndone in {(time.time() - started) / 60:.1f} minutes\n")
    print("validation loss (nats per byte)")
    for kind, name in NAMES.items():
        print(f"    {name:16} {losses[kind]['final'][-1][1]:.4f}")
    print(f"plot        {out / 'quickstart.png'}")
    print(f"checkpoint  {out / 'mhc' / 'checkpoint'}")
    print(f"resume it   bash {out / 'mhc' / 'resume.sh'}      ({steps} more steps, at the lowest rate)")
    print(f"sampled     {line}")
    print(f"exported    {out / 'mhc' / 'exported'}, without Megatron loaded by\n")
    print("    from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{out}/mhc/exported", trust_remote_code=True)')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps of each model")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the results"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where a GPU is")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 4:
        parser.error(f"--steps {args.steps}: give at least 4, or leave it out")
    if not exports():
        parser.error(f"{sys.executable} exports and samples by transformers 5: pip install 'transformers>=5'")
    machine = Machine.find(args.cpu)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        quickstart(machine, args.steps or (1000 if machine.gpu else 240), args.out.resolve())
    except StepFailed as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
