"""The text that people paste into issues: right on every machine, for every door, and without secrets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mhc.pretrain_gpt  # noqa: F401  # once, not in every process that is forked
from megatron_mhc import command_line, doctor
from megatron_mhc.config import MHCConfig
from megatron_mhc.doctor import launch, machine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SPEC = "--spec megatron_mhc.specs gpt_mhc_spec"
HYBRID, HYBRID_SPEC = "--hybrid-layer-pattern *-*-", "megatron_mhc.specs hybrid_mhc_spec"
MODEL = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --train-iters 10 --bf16 --transformer-impl local "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion"
)


def rows(text):
    """The report's rows by name, and the list of what is in the way."""
    found = {line[2:22].strip(): line[23:] for line in text.splitlines() if line.startswith("  ")}
    blocked = re.findall(r"^  \d+\. (.*)$", text, re.MULTILINE)
    return found, blocked


@pytest.fixture
def examine(run_ranks, monkeypatch):
    """What the doctor says of a command line, in a process of its own: (rows, in the way, text)."""
    monkeypatch.delenv("MEGATRON_MHC", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")

    def said(line):
        text, healthy = run_ranks(1, doctor.report, line.split())[0]
        found, blocked = rows(text)
        assert healthy == (not blocked)
        return found, blocked, text

    return said


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Scripts by relative paths: a stock one, a patched one, and one that has its parser in another file."""
    for path, text in {
        "stock/pretrain_gpt.py": "parse_and_validate_args()",
        "patched/pretrain_gpt.py": "parse_and_validate_args(add_mhc_args)",
        "own/train.py": "from arguments import parse",
        "own/arguments.py": "add_mhc_args(parser)",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k not in ("MEGATRON_MHC", "TRITON_INTERPRET")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    done = subprocess.run(
        [sys.executable, str(HERE / "doctor_child.py"), str(tmp_path_factory.mktemp("megatrons"))],
        input=json.dumps(f"{MODEL} --mhc-num-residual-streams 2".split()),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_machine_without_a_gpu_is_examined_as_an_h100(machines):
    found, blocked = rows(machines["as it is"][0])
    assert blocked == []
    assert found["GPU"] == found["driver"] == found["NVLink"] == "none"
    assert found["megatron-core"].endswith(">=0.17.0,<0.20 and main are supported")
    assert found["Megatron's symbols"] == "all as expected"
    assert found["back end"].startswith(
        "reference here, since there is no GPU; on an H100 triton, for 2 streams of 1024 channels in bfloat16"
    )
    assert found["back end"].endswith("not hopper, since --mhc-num-residual-streams 2 is not 4")
    assert found["layout"] == "TP 1, PP 1, VPP 1, CP 1, EP 1, DP 1, 1 ranks"


def test_without_triton_the_definition_serves_and_megatron_itself_cannot(machines):
    found, blocked = rows(machines["no triton"][0])
    assert "cannot be imported" in found["triton"] and found["default back end"].startswith("reference")
    assert found["default back end"].endswith("not triton, since triton is not installed")
    assert blocked[0].startswith("megatron-core cannot be imported: ModuleNotFoundError: import of triton")


def test_without_cuda_bindings_triton_runs(machines):
    found, blocked = rows(machines["no cuda-bindings"][0])
    assert "on an H100 triton, " in found["default back end"] and not blocked
    assert found["default back end"].endswith("not hopper, since cuda-bindings is not installed")


def test_a_broken_transformer_engine_is_named(machines):
    text, healthy = machines["broken transformer engine"]
    found, blocked = rows(text)
    assert not healthy and "transformer_engine" in blocked[0] and "cannot be imported" in blocked[0]
    assert "cannot be imported: ModuleNotFoundError" in found["transformer-engine"]
    assert found["not examined"].startswith("this needs a megatron-core")


@pytest.mark.parametrize(
    "kind, words",
    [
        ("old megatron", "megatron-core 0.16.1 is not supported: install megatron-core >=0.17.0,<0.20"),
        ("megatron with its own", "megatron-core 0.19.0 has hyper-connections of its own"),
        ("no megatron", "megatron-core is not installed: pip install 'megatron-core>=0.17.0,<0.20'"),
    ],
)
def test_a_megatron_that_does_not_serve_is_named(machines, kind, words):
    text, healthy = machines[kind]
    assert not healthy and rows(text)[1][0].startswith(words)


def test_every_machine_gets_a_whole_report_in_one_order(machines):
    for kind, (text, _) in machines.items():
        assert "Traceback" not in text, kind
        names = [line[2:22].strip() for line in text.splitlines() if line.startswith("  ")]
        order = ["megatron-mhc", "python", "torch", "megatron-core", "transformer-engine", "apex", "triton"]
        order += ["cuda-bindings", "NCCL", "driver", "GPU", "NVLink", "default back end"]
        assert [name for name in names if name in order] == order, kind


@pytest.mark.parametrize(
    "launch, door",
    [
        ("torchrun -m megatron_mhc.pretrain_gpt", "wheel, python -m megatron_mhc.pretrain_gpt"),
        ("torchrun pretrain_gpt.py --spec megatron_mhc.specs gpt_mhc_spec", "spec, " + SPEC),
        (f"torchrun pretrain_hybrid.py {HYBRID} --spec {HYBRID_SPEC}", f"spec, --spec {HYBRID_SPEC}"),
        (f"torchrun -m megatron_mhc.launch own/train.py {HYBRID}", "launch, python -m"),
        ("torchrun patched/pretrain_gpt.py --mhc-num-residual-streams 4", "flags of the script's own"),
        ("", "none, only arguments"),
    ],
)
def test_the_door_of_a_command_is_named(examine, scripts, launch, door):
    found, blocked, _ = examine(f"{launch} {MODEL}")
    assert found["entry point"].startswith(door) and blocked == []
    assert found["back end"] == (
        "reference here, since there is no GPU; on an H100 hopper, for 4 streams of 1024 channels in bfloat16"
    )
    assert found["boundary"] == "fused" and found["norm before F"] == "apart"


@pytest.mark.parametrize("spec", ["", SPEC])
@pytest.mark.parametrize(
    "script, words",
    [
        ("stock/pretrain_gpt.py", "stock/pretrain_gpt.py has no --mhc-* flags, its parser would refuse them"),
        ("nowhere/pretrain_gpt.py", "nowhere/pretrain_gpt.py is not here to look at; unless it has"),
        ("patched/pretrain_gpt.py", None),
        ("own/train.py", None),
    ],
)
def test_flags_that_a_script_does_not_take_are_in_the_way(examine, scripts, script, words, spec):
    _, blocked, _ = examine(f"torchrun {script} {MODEL} {spec} --mhc-num-residual-streams 2")
    if words is None:
        assert blocked == []
        return
    assert len(blocked) == 1 and blocked[0].startswith(words)
    assert "python -m megatron_mhc.launch" in blocked[0] and "in MEGATRON_MHC beside --spec" in blocked[0]


@pytest.mark.parametrize(
    "launch",
    ["", "torchrun -m megatron_mhc.launch stock/pretrain_gpt.py", "torchrun patched/pretrain_gpt.py"],
)
def test_a_misspelt_flag_is_ours_and_gets_a_hint(examine, scripts, launch):
    _, blocked, text = examine(f"{launch} {MODEL} --mhc-num-residual-stream 2")
    assert blocked == ["--mhc-num-residual-stream: no such flag, give --mhc-num-residual-streams"]
    assert "Megatron's parser" not in text and "not Megatron's" not in text


def test_a_run_on_cpus_is_told_what_runs_there(examine):
    line = f"torchrun --nproc-per-node 2 -m megatron_mhc.testing.cpu -m megatron_mhc.pretrain_gpt {MODEL}"
    line += " --distributed-backend gloo --pipeline-model-parallel-size 2 --mhc-pipeline-schedule interleaved"
    found, blocked, text = examine(f"CUDA_DEVICE_MAX_CONNECTIONS=32 {line}")
    assert found["back end"].endswith("channels in bfloat16, since it runs on a CPU") and blocked == []
    assert found["back end"].startswith("reference, for 4") and found["boundary"].startswith("apart, since")
    assert "over gloo; those of" in found["messages"] and "NCCL" not in text.partition("command")[2]
    _, blocked, _ = examine(f"{line} --mhc-backend hopper")
    assert any("--mhc-backend hopper: the streams are on cpu" in text for text in blocked)


@pytest.mark.parametrize("arguments, spec", [("", SPEC), (HYBRID, "--spec " + HYBRID_SPEC)])
def test_a_script_that_nothing_turns_to_mhc_is_told_how(examine, arguments, spec):
    found, blocked, _ = examine(f"torchrun train.py {MODEL} {arguments}")
    assert found["entry point"] == "none: this trains without mHC"
    assert len(blocked) == 1 and f"add {spec}" in blocked[0]


def test_what_a_hybrid_model_does_without_is_in_the_way(examine):
    asked = "--pipeline-model-parallel-size 2 --mhc-pipeline-schedule fused"
    line = f"-m megatron_mhc.pretrain_gpt {MODEL} {HYBRID} {asked}"
    _, blocked, _ = examine(f"CUDA_DEVICE_MAX_CONNECTIONS=32 torchrun --nproc-per-node 2 {line}")
    assert len(blocked) == 1 and "fused --mhc-pp-boundary whole does not support a HybridModel" in blocked[0]


def test_the_launch_door_is_asked_itself(examine):
    _, blocked, _ = examine(f"torchrun -m megatron_mhc.launch nowhere/pretrain_gpt.py {MODEL}")
    assert any("nowhere/pretrain_gpt.py: no such script" in text for text in blocked)


def test_options_come_from_the_environment_of_the_command(examine):
    found, blocked, _ = examine(
        f"MEGATRON_MHC=num_residual_streams=8,boundary=apart torchrun pretrain_gpt.py {MODEL} {SPEC}"
    )
    assert found["mHC options"] == "num_residual_streams=8, boundary=apart" and blocked == []
    assert "on an H100 triton, for 8" in found["back end"] and found["boundary"] == "apart"
    _, blocked, _ = examine(f"MEGATRON_MHC=h_res=none torchrun pretrain_gpt.py {MODEL} {SPEC}")
    assert any("h_res=none" in text or "h_res" in text for text in blocked)


def test_all_that_is_refused_is_listed(examine):
    _, blocked, _ = examine(f"{MODEL} --mhc-pp-boundary split --sft")
    for words in ("--mhc-pp-boundary split needs", "--sft is not supported"):
        assert any(words in text for text in blocked), (words, blocked)


def test_fp32_streams_have_the_back_end_of_their_own_dtype(examine):
    found, _, _ = examine(f"{MODEL} --fp32-residual-connection")
    assert "on an H100 triton, for 4 streams of 1024 channels in float32" in found["back end"]
    assert "not hopper, since the streams are torch.float32" in found["back end"]
    assert launch._first_look(["--bf16", "--fp32-residual-connection"]).dtype == "float32"


def test_one_hardware_queue_is_in_the_way_of_overlapped_schedules(examine):
    line = f"{MODEL} --pipeline-model-parallel-size 2 --mhc-pipeline-schedule interleaved"
    found, blocked, _ = examine(f"torchrun --nproc-per-node 4 -m megatron_mhc.pretrain_gpt {line}")
    assert blocked == [] and found["passes in flight"] == "3, 1 on ranks 0 to 1"
    assert found["layout"].startswith("TP 1, PP 2, VPP 1, CP 1, EP 1, DP 2")
    command = f"CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun -m megatron_mhc.pretrain_gpt {line}"
    found, blocked, _ = examine(command)
    assert blocked == [] and "pushed over peer memory" in found["messages"]
    _, blocked, _ = examine(f"{command} --mhc-pipeline-transport nccl")
    assert len(blocked) == 1 and "export CUDA_DEVICE_MAX_CONNECTIONS=32" in blocked[0]


def test_what_auto_would_take_is_said_for_every_link(examine):
    line = f"{MODEL} --mhc-pipeline-schedule auto"
    found, blocked, _ = examine(f"CUDA_DEVICE_MAX_CONNECTIONS=32 {line}")
    assert found["schedule"] == "auto takes megatron: one stage, no pipeline" and blocked == []
    line += " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    found, blocked, _ = examine(f"CUDA_DEVICE_MAX_CONNECTIONS=32 {line}")
    assert found["schedule"].startswith("auto, ") and blocked == []
    assert found["pushed"].startswith("interleaved ") and found["over NCCL"].startswith("megatron: ")
    assert "simulated steps in ms: " in found["several hosts"] and "passes in flight" in found
    found, blocked, _ = examine(f"CUDA_DEVICE_MAX_CONNECTIONS=1 {line} --mhc-pipeline-transport nccl")
    assert "pushed" not in found and "share one hardware queue" in found["over NCCL"] and blocked == []


def test_what_megatron_refuses_is_in_the_way_and_the_back_end_still_named(examine):
    found, blocked, _ = examine(f"{MODEL} --num-attention-heads 7 --mhc-backend hopper")
    assert "Megatron's checks" in blocked[0]
    assert found["back end"].startswith("refused here, since there is no GPU; on an H100 hopper")
    assert found["back end"].endswith("as --mhc-backend asks")
    _, blocked, _ = examine(f"{MODEL} --mhc-num-residual-streams none")
    assert "--mhc-num-residual-streams" in blocked[0]
    found, blocked, _ = examine(f"{MODEL} --mhc-num-residual-streams 8 --mhc-backend hopper")
    assert found["back end"] == "none can serve" and "8 is not 4" in blocked[0]


def test_values_of_flags_that_nobody_knows_stay_out_of_the_report(examine):
    found, blocked, text = examine(f"torchrun pretrain_gpt.py {MODEL} {SPEC} --my-key 12ab34 -p=56cd")
    assert found["not Megatron's"].startswith("--my-key:") and blocked == []
    assert "12ab34" not in text and "56cd" not in text
    _, blocked, text = examine(f"{MODEL} --my-key 12ab34")
    assert blocked == ["Megatron's parser knows no --my-key"] and "12ab34" not in text


def test_home_is_shortened_and_other_variables_stay_out(run_ranks, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT.parent))
    monkeypatch.setenv("WANDB_API_KEY", "0123abc")
    text, _ = run_ranks(1, doctor.report, [])[0]
    assert f"~/{ROOT.name}/megatron_mhc" in text and str(ROOT) not in text and "0123abc" not in text


@pytest.mark.parametrize(
    "options, backend, full, expected",
    [
        ({}, "hopper", False, "fused"),
        ({}, "triton", False, "linked"),
        ({"boundary": "fused"}, "triton", False, "fused"),
        ({}, "hopper", True, "linked, since"),
        ({"boundary": "apart"}, "hopper", False, "apart"),
        ({"boundary": "fused"}, "reference", False, "apart, since"),
        ({"recompute_layer_num": "auto", "recompute_coefficients": True}, "hopper", False, "apart, since"),
    ],
)
def test_boundary_follows_options_and_back_end(options, backend, full, expected):
    assert launch.boundary(MHCConfig(**options), backend, full).startswith(expected)


def test_links_are_read_from_the_topology():
    matrix = """
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tNV18\tPIX\t0-47\t0
GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0
GPU2\tNV18\tPHB\t X \tSYS\t0-47\t0
NIC0\tPIX\tSYS\tSYS\t X

Legend:
"""
    assert machine.links(matrix) == "NV18, PHB between 3 GPUs"
    assert machine.links("\tGPU0\tNIC0\nGPU0\t X \tPIX\n") == "one GPU"


def test_programs_are_named_on_the_command_line(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "megatron_mhc", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)

    assert run("nothing").returncode == 2 and "doctor" in run("--help").stdout
    done = run("memory", "--config", str(tmp_path / "missing"))
    assert done.returncode == 2 and "cannot be read" in done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--cuda-graph-impl local", "local, of each layer all, with the connections of what it holds"),
        (
            "--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp",
            "transformer_engine, of each layer attn mlp, with the connections of what it holds",
        ),
        (
            "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
            "full_iteration, one of the forward and backward passes of a step",
        ),
    ],
)
def test_graphs_are_named(examine, flags, said):
    found, blocked, _ = examine(f"{MODEL} {flags}")
    assert found["CUDA graphs"] == said and blocked == []


def test_a_hybrid_model_is_refused_where_a_gpt_is_planned(run_ranks):
    def counted():
        with pytest.raises(ValueError, match="--hybrid-layer-pattern: this is for a GPT's layers; drop it"):
            command_line.parse(f"{MODEL} {HYBRID}".split(), 1)

    run_ranks(1, counted)
