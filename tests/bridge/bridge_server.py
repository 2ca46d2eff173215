"""Runs functions of bridge_cases.py on forked ranks, in a process that has imported Megatron-Bridge once.

Reads a line for each: base64 of the pickled (name, world, args). Answers with base64 of the pickled (failed,
result of each rank, or the error's text).
"""

from __future__ import annotations

import base64
import os
import pickle
import sys

from megatron_mhc.testing import bridge, cpu, ranks

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what Megatron prints is no answer

cpu.install(pretend_cuda=True)
bridge.install()
cpu.patch_megatron()
cpu.use_plain_adam()
cpu.use_local_modules()

import bridge_cases  # noqa: E402

for line in sys.stdin:
    name, world, args = pickle.loads(base64.b64decode(line))
    try:
        answer = (False, ranks.run_ranks(world, getattr(bridge_cases, name), *args, timeout=200))
    except ranks.RankError as error:
        answer = (True, str(error))
    print(base64.b64encode(pickle.dumps(answer)).decode(), file=answers, flush=True)
