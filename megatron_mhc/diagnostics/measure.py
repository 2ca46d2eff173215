"""Measure the mappings of a checkpoint on one validation batch, with Megatron's own machinery.

    torchrun ... -m megatron_mhc.diagnostics.measure REPORT.json <arguments of megatron_mhc.pretrain_gpt>

The arguments are those of the training run, with --load and in any layout: Megatron reshards the
checkpoint. Nothing is trained or saved. `python -m megatron_mhc.plot` draws REPORT.json.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model

from megatron_mhc import pretrain_gpt
from megatron_mhc.diagnostics.report import reduce_samples
from megatron_mhc.diagnostics.sampler import Sample, Sampler

ADDED = ["--skip-train", "--eval-iters", "1", "--no-load-optim", "--no-load-rng"]


def main() -> None:
    """Run the first validation micro-batch and write the report."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    path = Path(sys.argv.pop(1))
    if "--load" not in sys.argv:
        raise SystemExit("give the checkpoint to measure: --load FOLDER")
    sys.argv += ADDED
    samplers: dict[int, Sampler] = {}  # by model chunk

    with ExitStack() as stack:

        def step(data_iterator: Any, model: Any, *rest: Any) -> Any:
            if id(model) not in samplers:
                config = get_attr_wrapped_model(model, "config")
                samplers[id(model)] = stack.enter_context(Sampler(model, config))
            return pretrain_gpt.forward_step(data_iterator, model, *rest)

        def write() -> None:
            samples: dict[int, Sample] = {}
            for sampler in samplers.values():
                samples |= sampler.samples
            report = reduce_samples(samples, sampler.config, sampler.mhc, sampler.capacity, sampler.names)
            if torch.distributed.get_rank() == 0:
                report.save(path)

        pretrain_gpt.main(step, write)


if __name__ == "__main__":
    main()
