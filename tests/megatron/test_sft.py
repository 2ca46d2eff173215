"""Fine-tuning on conversations (--sft), whose sequences are packed, by Megatron-LM's own script.

    MHC_MEGATRON=/path/to/Megatron-LM python -m pytest tests/megatron/test_sft.py

The checkout is of 0.19; `datasets` has to be installed. Attention is `megatron_mhc.testing.packed`'s.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pretrain_runs
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = [Path(path) for path in os.environ.get("MHC_MEGATRON", "").split(os.pathsep) if path]
SCRIPTS = [path / "pretrain_gpt.py" for path in PATHS if (path / "pretrain_gpt.py").exists()]
pytestmark = [
    pytest.mark.skipif(not SCRIPTS, reason="MHC_MEGATRON names no checkout"),
    pytest.mark.timeout(900),
]
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

WORDS = "a few words that make up each and every sentence of these conversations".split()
STEPS = pretrain_runs.STEPS
PADDED = ["--make-vocab-size-divisible-by", "128"]  # as TP2 has it by 64


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A file of conversations of many lengths, and a tokenizer of their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder, rng = tmp_path_factory.mktemp("sft"), random.Random(3)
    special = ["<unk>", "<pad>", "</s>"]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder / "tokenizer")

    def says(role):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))}

    lines = [[says(role) for role in 2 * ("system", "user", "assistant")] for _ in range(64)]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return data, folder / "tokenizer"


@pytest.fixture
def train(conversations, tmp_path):
    """`train(processes, arguments)` fine-tunes a small model; returns the losses of its steps."""
    data, tokenizer = conversations
    arguments = list(pretrain_runs.ARGUMENTS)
    arguments.remove("--mock-data")
    arguments[arguments.index("NullTokenizer")] = "SFTTokenizer"
    at = arguments.index("--vocab-size")
    del arguments[at : at + 2]
    arguments += ["--sft", "--sft-tokenizer-prompt-format", "identity", "--tokenizer-model", str(tokenizer)]
    arguments += ["--data-path", str(data), "--calculate-per-token-loss"]

    def train(processes, *more):
        folder = tmp_path / f"of {processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "megatron_mhc.testing.cpu"]
        command += ["-m", "megatron_mhc.launch", str(SCRIPTS[0]), *arguments, *more]
        path = os.pathsep.join([str(SCRIPTS[0].parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "NO_VCS_VERSION": "1", "HF_DATASETS_OFFLINE": "1"}
        command += ["--tensorboard-dir", str(folder)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return pretrain_runs.losses(folder)

    return train


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "2"],
        ["--pipeline-model-parallel-size", "2"],
        ["--pipeline-model-parallel-size", "2", "--mhc-pipeline-schedule", "interleaved",
         "--num-layers-per-virtual-pipeline-stage", "1"],
    ],
    ids=["tp", "pp", "interleaved"],
)  # fmt: skip
def test_conversations_are_learned_as_on_one_process(layout, train, tmp_path):
    saved = str(tmp_path / "checkpoints")
    alone = train(1, *pretrain_runs.MHC, *PADDED, "--save", saved)
    assert len(alone) == STEPS and alone[-1] < alone[0] - 0.2
    padded = [] if "--tensor-model-parallel-size" in layout else PADDED
    resumed = ["--load", saved, "--ckpt-step", str(STEPS // 2), "--no-load-rng"]
    further = train(2, *pretrain_runs.MHC, *padded, *layout, *resumed)
    assert further == pytest.approx(alone[STEPS // 2 :], rel=1e-5)
