"""Megatron-LM's dynamic text generation server, started by the launcher and asked over HTTP.

    MHC_MEGATRON=/path/to/Megatron-LM python -m pytest tests/megatron/test_text_server.py

Skipped unless a checkout is named, and where what the server needs is not installed. On a CPU its attention
is `testing.paged`; contexts, engine, coordinator and HTTP front ends are Megatron's.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pretrain_runs
import pytest
from megatron.core.package_info import MINOR

from megatron_mhc import generate

SCRIPT = "tools/run_dynamic_text_generation_server.py"
NAMED = [Path(path) for path in os.environ.get("MHC_MEGATRON", "").split(os.pathsep) if path]
RELEASE = "megatron/core/package_info.py"
CHECKOUTS = [  # of the installed release, which writes the checkpoint
    path
    for path in NAMED
    if (path / SCRIPT).exists() and f"MINOR = {MINOR}\n" in (path / RELEASE).read_text()
]
NEEDS = ("quart", "hypercorn", "zmq", "msgpack", "transformers")
ABSENT = [name for name in NEEDS if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUTS, reason=f"MHC_MEGATRON names no checkout of this release that has {SCRIPT}"
    ),
    pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)}: not installed"),
    pytest.mark.timeout(600),
]
MODEL = shlex.split("""
    --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --num-layers 4 --hidden-size 32 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu
    --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 1
    --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 64
""")
ENGINE = shlex.split("""
    --inference-max-seq-length 32 --inference-dynamic-batching-block-size 4
    --inference-dynamic-batching-buffer-size-gb 0.001 --inference-dynamic-batching-max-requests 4
    --inference-dynamic-batching-unified-memory-level 0
""")
FORMS = {
    "paper": pretrain_runs.MHC,
    "single_pass": [*pretrain_runs.MHC, "--mhc-read", "previous"],
}
LAYOUTS = {"tp2": "--tensor-model-parallel-size", "pp2": "--pipeline-model-parallel-size"}
PROMPTS, NEW = [[5, 17, 3], [60, 2, 2, 41, 9, 33], [8]], 8


@pytest.fixture(scope="module", params=FORMS)
def trained(request, tmp_path_factory):
    """The checkpoint of a few steps, and the mHC options of its training."""
    folder, options = tmp_path_factory.mktemp(request.param), FORMS[request.param]
    few = ["--train-iters", "4", "--eval-iters", "0", "--save", str(folder / "checkpoint")]
    pretrain_runs.launch(folder, *options, *few)
    return folder / "checkpoint", options


@contextlib.contextmanager
def server(checkout, *arguments):
    """Start it on two CPU processes; yields what asks it, `ask(path, body)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_mhc.testing.cpu", "-m", "megatron_mhc.launch", str(checkout / SCRIPT)]
    command += [*MODEL, *ENGINE, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    paths = [str(checkout), str(pretrain_runs.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NO_VCS_VERSION": "1"}

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    log = tempfile.TemporaryFile("w+", errors="replace")
    process = subprocess.Popen(
        command, cwd=pretrain_runs.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                ask("/health")
                break
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                pytest.fail("the server did not start:\n" + log.read()[-5000:])
            time.sleep(0.5)
        yield ask
    finally:
        # A rank leads a group, in which its coordinator and front ends outlive it.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = children.read_text().split() if children.exists() else []
        process.terminate()
        for rank in map(int, ranks):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)
        process.wait(timeout=30)
        log.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_a_server_gives_the_text_of_generate(trained, checkout, layout):
    """Greedy, of prompts of several lengths, together and one by one."""
    checkpoint, options = trained
    model, _ = generate.load_model(checkpoint)
    wanted = [generate.continued(model, None, " ".join(map(str, ids)), NEW, 0.0) for ids in PROMPTS]
    greedy = dict(max_tokens=NEW, temperature=0, ignore_eos=True)
    with server(checkout, *options, LAYOUTS[layout], "2", "--load", str(checkpoint)) as ask:
        together = ask("/v1/completions", dict(prompt=PROMPTS, **greedy))["choices"]
        (alone,) = ask("/v1/completions", dict(prompt=PROMPTS[1], **greedy))["choices"]
    for ids, text, choice in zip(PROMPTS, wanted, together, strict=True):
        assert [*ids, *choice["generation_token_ids"]] == [int(word) for word in text.split()]
        assert choice["text"] == " ".join(text.split()[len(ids) :])
    assert alone["generation_token_ids"] == together[1]["generation_token_ids"]
