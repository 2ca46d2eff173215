"""Runs a combination of `switches` on its ranks, and compares it with its twin on one process.

python tests/distributed/switched.py 0 300 out.txt   # from number 0 to 300: what each did, added to the file
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_checkpoint as checkpoints
import test_fp32_residual as fp32_residual
import test_heterogeneous
import test_packed
import torch
import torch.distributed as dist
from harness import (
    Iteration,
    Layout,
    build,
    differences,
    get_forward_backward_func,
    global_parameters,
    iterate,
)
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload
from switches import LAYOUTS, SEED, TRAINED, Combination, combinations, digest

from benchmarks.harness import machine
from megatron_mhc import MHCConfig, register
from megatron_mhc.hooks.schedule import by_model
from megatron_mhc.pipeline import auto
from megatron_mhc.pipeline.layer_times import Launch
from megatron_mhc.pipeline.options import check_config
from megatron_mhc.testing import hybrid, ranks
from megatron_mhc.testing import offloading as layer_offloading
from megatron_mhc.testing.gpt import SMALL
from megatron_mhc.testing.parameters import fill

ERROR, FLOAT32_ERROR = 1e-10, 1e-5
LAUNCH = Launch(SMALL.sequence, SMALL.micro_batch, 4)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    # Every rank orthogonalises whole matrices, in float32: Megatron's defaults depend on the layout.
    "muon": dict(optimizer="muon", muon_tp_mode="duplicated", muon_fp32_matmul_prec="highest"),
}


def weights(trained: str, chunks: list[Any]) -> None:
    """Fill the chunks, and freeze what is not trained."""
    fill(chunks)
    for name, parameter in global_parameters(chunks):
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in TRAINED[trained]))


def offloading() -> None:
    """Have a CPU's tensors pass for a GPU's where activations are offloaded, see test_offloading."""

    class Handler(offload.ChunkOffloadHandler):
        @staticmethod
        def _can_manage_tensor_for_offload(tensor: Any) -> bool:
            return not isinstance(tensor, torch.nn.Parameter)

    offload.ChunkOffloadHandler = Handler
    transformer_engine.cpu_offload = types.SimpleNamespace()


def described(case: Combination, settings: dict[str, Any], on_one: bool) -> tuple[str, dict[str, Any], Any]:
    """The model's kind and settings for `Layout.config`, and for `build` what builds a stage of it."""
    kind, _, what = case.kind.partition(" ")
    settings = case.model | settings
    if settings.get("fp8"):
        settings |= dict(transformer_impl="local")  # as the layers here are
    if kind == "heterogeneous":
        return "dense", test_heterogeneous.heterogeneous(what) | settings, None
    if kind != "hybrid":
        return kind, settings, None
    pattern = what.replace("|", "") if on_one else what
    layers = re.sub(r"\||/.*", "", what)
    settings |= dict(num_layers=len(layers), is_hybrid_model=True, mtp_num_layers=what.count("/") or None)
    kind = "mla" if "+" in layers else "moe" if "E" in layers else "dense"
    return kind, settings, hybrid.model(pattern, SMALL)


def configured(layout: Layout, kind: str, settings: dict[str, Any]) -> Any:
    """The model's configuration; nodes of layers are asked for behind Megatron's checks, which want bf16."""
    nodes = settings.get("overlap_moe_expert_parallel_comm") and not settings.get("delay_wgrad_compute")
    if nodes:
        layout.config(kind, **settings | dict(bf16=True, params_dtype=torch.bfloat16))
        settings = settings | dict(overlap_moe_expert_parallel_comm=False)
    config = layout.config(kind, **settings)
    config.overlap_moe_expert_parallel_comm = config.overlap_moe_expert_parallel_comm or bool(nodes)
    return config


def start(
    case: Combination, layout: Layout, mhc: MHCConfig | None, settings: dict[str, Any], ddp: Any, on_one: bool
) -> tuple[Any, list[Any], Any]:
    """(config, chunks, optimizer or None) of a model; `layout` is initialized."""
    kind, settings, model = described(case, settings, on_one)
    if settings.get("fine_grained_activation_offloading"):
        offloading()
    if settings.get("cpu_offloading"):
        layer_offloading.install()
    if case.how == "packed":
        test_packed.take_packed(token_local=layout.cp > 1 or case.layout == "cp2")
    if case.how == "fp32_residual":
        torch.nn.RMSNorm = fp32_residual.Norm
        settings |= dict(fp32_residual_connection=True) | fp32_residual.BF16
    if case.how == "training":
        settings |= dict(params_dtype=torch.float32)
    config = configured(layout, kind, settings)
    if mhc is not None:
        mhc = auto.resolved(config, mhc, LAUNCH)
    fill_ = functools.partial(weights, case.trained)
    if case.how != "training":
        chunks = build(layout, config, kind, mhc, ddp, weights=fill_, model=model)
        return config, chunks, None
    more = dict(settings) | dict(pipeline_dtype=torch.float32)
    more.pop("params_dtype")
    chunks, config, optimizer = checkpoints.start(
        layout, kind, torch.float32, weights=fill_, mhc=mhc, settings=more, **OPTIMIZERS[case.optimizer]
    )
    return config, chunks, optimizer


def schedule_of(mhc: MHCConfig) -> Callable[..., Any]:
    """What megatron.training takes with the plugin's hooks."""
    return by_model(get_forward_backward_func())


def iteration(case: Combination, config: Any, chunks: list[Any], mhc: MHCConfig) -> float:
    """The loss of an iteration, whose gradients stay in the chunks."""
    if case.ddp.get("overlap_grad_reduce"):
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    if case.how == "packed":
        return test_packed.loss_of(chunks, schedule_of(mhc))
    if config.fine_grained_activation_offloading:
        for _ in range(2):  # what is offloaded is known behind a warm-up
            iterate(chunks, config)
    return iterate(chunks, config, schedule=schedule_of(mhc))


def steps(
    config: Any, chunks: list[Any], optimizer: Any, mhc: MHCConfig, numbers: range
) -> list[tuple[float, float]]:
    """The loss and gradient norm of each step."""
    history: list[tuple[float, float]] = []
    for number in numbers:
        optimizer.zero_grad()
        loss = iterate(chunks, config, seed=number, schedule=schedule_of(mhc))
        succeeded, norm, _ = optimizer.step()
        assert succeeded
        history.append((loss, float(norm)))
    return history


@functools.cache
def _twin_of(key: str) -> Any:
    case = Combination(**json.loads(key))

    def run() -> Any:
        Layout().initialize()
        mhc = MHCConfig(**case.arithmetic)
        config, chunks, optimizer = start(case, Layout(), mhc, case.settings, None, on_one=True)
        if optimizer is not None:
            return steps(config, chunks, optimizer, mhc, range(1))
        return Iteration.of(iteration(case, config, chunks, mhc), chunks)

    return ranks.run_ranks(1, run)[0]


def twin(case: Combination) -> Any:
    """The same model and training on one process, with nothing switched on but what changes the result."""
    layers = {name: value for name, value in case.settings.items() if name == "num_layers"}
    layout = "cp2" if case.layout == "cp2" else "dp2"  # whose packed attention is another
    kind = case.kind.replace("|", "")
    # The streams' rounding to bf16 in a folded norm is not a norm's apart.
    arithmetic = case.arithmetic | ({"norm": case.mhc["norm"]} if case.how == "fp32_residual" else {})
    alone = dict(layout=layout, kind=kind, arithmetic=arithmetic, mhc={}, settings=layers, ddp={}, save="")
    return _twin_of(str(dataclasses.replace(case, **alone)))


def refusal(case: Combination, mhc: dict[str, Any] | None) -> tuple[str | None, Any]:
    """Who refuses to build the model, and why; or (config, chunks, optimizer, options).

    Args:
        mhc: None for Megatron's own model.
    """
    layout = LAYOUTS[case.layout]
    layout.initialize()
    built, why = None, None
    try:
        options = None if mhc is None else MHCConfig(**case.arithmetic, **mhc)
        built = (*start(case, layout, options, case.settings, case.ddp, on_one=False), options)
        if options is not None:
            check_config(built[0], built[0].mhc)
    except (AssertionError, NotImplementedError, ValueError) as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        why = f"{'megatron_mhc' if 'megatron_mhc' in file else 'Megatron'}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, why)
    return next((reason for reason in everyone if reason), None), built


def outcome(case: Combination, expected: Any, folder: Path) -> Any:
    """Who refuses to build the model, and why; or how its training compares with the twin's."""
    register()
    why, built = refusal(case, case.mhc)
    if why is not None:
        if why.startswith("Megatron: ") and refusal(case, None)[0] is None:
            return f"with mHC alone, {why}"
        return why
    config, chunks, optimizer, mhc = built
    if optimizer is None:
        loss = iteration(case, config, chunks, mhc)
        dtype = torch.float32 if case.how == "fp32_residual" else torch.float64
        return differences(loss, chunks, expected, dtype)
    history = steps(config, chunks, optimizer, mhc, range(1))
    fully_parallel = case.save == "fully_parallel"
    checkpoints.save(folder, chunks, optimizer, "fully_reshardable", fully_parallel)
    history += steps(config, chunks, optimizer, mhc, range(1, 3))
    _, (config, chunks, optimizer, mhc) = refusal(case, case.mhc)
    checkpoints.load(folder, chunks, optimizer, "fully_reshardable")
    return history, steps(config, chunks, optimizer, mhc, range(1, 3))


def tried(case: Combination, run_ranks: Callable[..., Any] = ranks.run_ranks) -> str:
    """`trains`, or by whom it is refused and why.

    Raises:
        AssertionError: it is neither right nor refused by name.
    """
    try:
        expected = twin(case)
    except Exception as error:  # options that contradict each other leave no twin; it must be refused
        expected, without = None, str(error)
    with tempfile.TemporaryDirectory(prefix="switches_") as folder:
        result = run_ranks(case.world, outcome, case, expected, Path(folder) / "saved")[0]
    if isinstance(result, str):
        named = re.search(r"--[a-z]+", result) if result.startswith("megatron_mhc: ") else True
        assert named and not result.startswith("with mHC alone"), f"not refused by name: {result}"
        return result
    assert expected is not None, without
    if case.how == "training":
        history, resumed = result
        # Of the first step: later ones have Adam's steps where a gradient is nothing but its rounding.
        (loss, norm), (expected_loss, expected_norm) = history[0], expected[0]
        assert abs(loss - expected_loss) <= FLOAT32_ERROR, (loss, expected_loss, str(case))
        norm_error = abs(norm - expected_norm) / max(1, expected_norm)
        assert norm_error <= 10 * FLOAT32_ERROR, (norm, expected_norm, str(case))
        assert resumed == history[1:], (resumed, history, str(case))
        return "trains"
    limit = FLOAT32_ERROR if case.how == "fp32_residual" else ERROR
    error, name = result.worst if result.gradients else (0.0, "")
    assert result.loss <= limit, (result.loss, str(case))
    assert error <= limit, (error, name, str(case))
    return "trains"


def line(number: int, case: Combination, did: str) -> str:
    """Of the list in docs/results/support: a combination and what it did, in the first words that name it."""
    short = " ".join(did.replace("megatron_mhc: ", "refused: ").split())[:110]
    return "\t".join((f"{number}", case.layout, case.kind, case.how, case.trained, short)) + "\n"


def head() -> str:
    """The first line of the list."""
    about = machine()
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items() if found)
    where = f"{about['device']}, {about['date']}, commit {about['commit']}, {versions}"
    return f"# seed {SEED}, combinations {digest()}; {where}\n"


def main() -> None:
    """Run combinations, and write down what each did; a failure in full on stderr."""
    first, last, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if not path.exists():
        path.write_text(head())
    bad = 0
    for number, case in enumerate(combinations(last)[first:], first):
        try:
            did = tried(case)
        except Exception as error:
            bad += 1
            did = f"FAILED: {error}"
            print(number, case, error, sep="\n", file=sys.stderr, flush=True)
        with path.open("a") as file:
            file.write(line(number, case, did))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
