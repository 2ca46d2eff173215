"""Measure the stream mappings of a checkpoint on one validation batch, with Megatron's own machinery.

    <launcher> gains.py RESULT.json <arguments of megatron_mhc.pretrain_gpt, with --load and --skip-train>

Run it in one process: Megatron reshards whatever layout the checkpoint was saved under.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mhc import pretrain_gpt
from megatron_mhc.diagnostics import amax_gain, capture_h_res, composite

batches: list[list[Tensor]] = []


def forward_step(data_iterator: Any, model: Any) -> Any:
    """pretrain_gpt's forward step, keeping each sub-layer's H_res: [T, n, n]."""
    with capture_h_res(model) as h_res:
        result = pretrain_gpt.forward_step(data_iterator, model)
    batches.append(h_res)
    return result


def gains(h_res: list[Tensor]) -> dict[str, list[float]]:
    """Gains per sub-layer, averaged over tokens: of itself, and of all from or up to it.

    The composite forward gain at sub-layer l is that of H_l ... H_1, input to l; the backward gain that
    of H_L ... H_l, output to l.
    """
    count = range(len(h_res))
    return {
        "single forward": [amax_gain(h)[0].mean().item() for h in h_res],
        "single backward": [amax_gain(h)[1].mean().item() for h in h_res],
        "composite forward": [amax_gain(composite(h_res[: i + 1]))[0].mean().item() for i in count],
        "composite backward": [amax_gain(composite(h_res[i:]))[1].mean().item() for i in count],
    }


if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):  # the rest is pretrain_gpt's
        raise SystemExit(__doc__)
    result = Path(sys.argv.pop(1))
    pretrain_gpt.main(forward_step)
    # The first micro-batch is enough: the gains are averages over its tokens.
    result.write_text(json.dumps(gains(batches[0])))
