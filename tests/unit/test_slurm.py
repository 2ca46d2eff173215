"""The sbatch files, run by bash with stubs in place of srun and scontrol; nothing is trained."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (ROOT / "examples").glob("*.sbatch"))

# Runs the first and the last task in place of all, and keeps what it was given. A task is "python": a stub
# that does what Megatron does with its checkpoint and with SIGTERM.
SRUN = """#!/bin/bash
printf '%q ' "$@" >> "$OUT/srun"; echo >> "$OUT/srun"
while [[ "$1" == -* ]]; do
    case $1 in --*=*) shift ;; *) shift 2 ;; esac
done
for task in 0 $((SLURM_NTASKS - 1)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 8)) SLURM_NODEID=$((task / 8)) "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do wait "$pid"; done # SIGTERM ends a wait
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $VIRTUAL_ENV" >> "$OUT/ranks"
echo "$CUDA_DEVICE_MAX_CONNECTIONS $PYTORCH_CUDA_ALLOC_CONF $NCCL_IB_TIMEOUT" >> "$OUT/environment"
tracker=$OUT/checkpoint/latest_checkpointed_iteration.txt
mkdir -p "$OUT/checkpoint"
while [ $# -gt 0 ]; do [ "$1" = --train-iters ] && end=$2; shift; done
case $BEHAVIOUR in
    fail) exit 3 ;;
    wait) trap 'sleep 0.5; printf %s 1234 > "$tracker"; exit 0' TERM
          touch "$OUT/started.$RANK"; while true; do sleep 0.1; done ;;
    *) printf %s "$end" > "$tracker.$RANK"; mv "$tracker.$RANK" "$tracker" ;;
esac
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'first\\nsecond\\n' ;;
    requeue) echo "$2" >> "$OUT/requeued" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Start an sbatch file as SLURM would: a copy of it, in the folder that it was submitted from."""
    stubs = tmp_path / "bin"
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text(f"export VIRTUAL_ENV={tmp_path}/venv\n")
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def begin(file, *arguments, **variables):
        spool = tmp_path / "slurm_script"
        text = (ROOT / "examples" / file).read_text()
        spool.write_text(text)
        nodes = int(directive(text, "nodes"))
        environment = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment |= {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "OUT": str(tmp_path / "out"),
            "DATA": "mock",
            "VENV": str(tmp_path / "venv"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(nodes * int(directive(text, "ntasks-per-node"))),
            "STEPS": "30000" if variables.get("BEHAVIOUR") == "wait" else "20",
            "BEHAVIOUR": "train",
        } | variables
        return subprocess.Popen(
            ["bash", str(spool), *arguments],
            cwd="/",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


def directive(text, name):
    return re.search(rf"^#SBATCH --{name}=(\S+)$", text, re.M).group(1)


def finish(job, timeout=60):
    try:
        output, _ = job.communicate(timeout=timeout)
    finally:
        job.kill()
    return job.returncode, output


def wait_for_tasks(tmp_path):
    deadline = time.monotonic() + 30
    while len(list((tmp_path / "out").glob("started.*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def calls(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "out/srun").read_text().splitlines()]


@pytest.mark.parametrize("file", FILES)
def test_job_starts_every_rank(start, tmp_path, file):
    returncode, output = finish(start(file, "--seed", "7"))
    assert returncode == 0, output
    (call,) = calls(tmp_path)
    assert call[-2:] == ["--seed", "7"] and "--exit-signal-handler" in call
    assert call[call.index("--output") + 1].endswith("/out/logs/%x-%j-rank%t.log")
    world = 8 * int(directive((ROOT / "examples" / file).read_text(), "nodes"))
    ranks = set((tmp_path / "out/ranks").read_text().splitlines())
    assert ranks == {f"{r} {r % 8} {world} 8 first 33456 {tmp_path}/venv" for r in (0, world - 1)}
    assert (tmp_path / "out/checkpoint/latest_checkpointed_iteration.txt").read_text() == "20"
    assert not (tmp_path / "out/requeued").exists()


def test_sigterm_saves_and_requeues(start, tmp_path):
    job = start("slurm_3b.sbatch", BEHAVIOUR="wait")
    wait_for_tasks(tmp_path)
    job.send_signal(signal.SIGTERM)
    returncode, output = finish(job)
    assert returncode == 0, output
    # It waited until the tasks had saved.
    assert (tmp_path / "out/checkpoint/latest_checkpointed_iteration.txt").read_text() == "1234"
    assert (tmp_path / "out/requeued").read_text() == "123456\n"
    assert len(calls(tmp_path)) == 1


def test_sigterm_at_the_last_step_does_not_requeue(start, tmp_path):
    job = start("slurm_3b.sbatch", BEHAVIOUR="wait", STEPS="1234")
    wait_for_tasks(tmp_path)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 0
    assert not (tmp_path / "out/requeued").exists()


def test_a_failed_step_fails_the_job_and_is_not_requeued(start, tmp_path):
    returncode, _ = finish(start("slurm_3b.sbatch", BEHAVIOUR="fail"))
    assert returncode == 3
    assert len(calls(tmp_path)) == 1 and not (tmp_path / "out/requeued").exists()


@pytest.mark.parametrize(
    "given, seen",
    [
        ({}, "1 expandable_segments:True 22"),
        (
            {
                "CUDA_DEVICE_MAX_CONNECTIONS": "32",
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
                "NCCL_IB_TIMEOUT": "20",
            },
            "32 max_split_size_mb:512 20",
        ),
    ],
)
def test_ranks_get_the_environment_and_what_is_set_stays(start, tmp_path, given, seen):
    returncode, output = finish(start("slurm_27b.sbatch", WITH="fp8 deepep", **given))
    assert returncode == 0, output
    assert set((tmp_path / "out/environment").read_text().splitlines()) == {seen}
    assert {"--fp8-format", "--moe-flex-dispatcher-backend"} <= set(calls(tmp_path)[0])


def test_container_form_and_baseline(start, tmp_path):
    job = start("slurm_3b.sbatch", FORM="vanilla", CONTAINER="image.sqsh", MOUNTS="/data:/data")
    returncode, output = finish(job)
    assert returncode == 0, output
    call = calls(tmp_path)[0]
    assert call[call.index("--container-image") + 1] == "image.sqsh"
    assert call[call.index("--container-mounts") + 1] == f"{ROOT}:{ROOT},/data:/data"
    assert "--no-mhc" in call
    assert not any("venv" in line for line in (tmp_path / "out/ranks").read_text().splitlines())


@pytest.mark.parametrize("file", FILES)
def test_directives_ask_for_what_the_script_counts_on(file):
    text = (ROOT / "examples" / file).read_text()
    assert directive(text, "ntasks-per-node") == directive(text, "gpus-per-node")
    assert directive(text, "signal") == "B:TERM@600"
    assert re.search(r"^#SBATCH --requeue$", text, re.M)
