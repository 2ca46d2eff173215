"""Generating with mHC beside vanilla's, alternating in one process, by Megatron's own inference on one GPU.

    python -m benchmarks.decode --out decode.json [--only decode,prefill,kernels] [--batches 1,32]
        [--prompt 128] [--new 64] [--prefill 4096] [--tokens 1,2,8,32,64]

decode   both models of a recipe with random weights (`examples/recipe.sh MODEL`: Transformer Engine's layers,
         bf16), by a StaticInferenceContext and a GPTInferenceWrapper: a prompt, then greedy tokens one at a
         time with the KV cache. The first generation of each is not timed: cuDNN plans attention for every
         length of the cache, kernels are compiled.
graph    one such step captured by hand in a CUDA graph, which is replayed at the last position: what a step
         takes where the host does nothing. Megatron's static cache is addressed by numbers of the host, so
         that such a graph generates no text; `error`: of its logits, relative to those of the eager step.
prefill  one prompt of --prefill tokens, of which the last one's logits are computed.
kernels  the forward of connections in a row, pre -> F -> post_res with F the identity, at few tokens, without
         a graph of autograd, by each back end of --mhc-backend; of a connection.

ms              median interval between the ends of steps; `apart, %`: of the rounds' medians
tokens_per_s    of all sequences of the batch
host_ms         until a step has returned on the host, from an idle device
kernels_ms      GPU time summed over kernels and copies of a step, any_ms: in which any of them ran (CUPTI)
busy            any_ms / ms; below 0.95 the host sets the pace
launches        kernels and copies of a step
peak_MiB        above what is there before a step
graph_us, python_us, host_us    as in `python -m benchmarks.kernels --help`

Without a GPU, to check the program and no speed: `python -m megatron_mhc.testing.cpu -m benchmarks.decode
--tiny`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    ON_GPU,
    Report,
    Row,
    attempt,
    bars,
    captured,
    clean,
    command_line,
    gpu_work,
    host_ms,
    intervals,
    numbers,
    one_rank,
    over,
    summary,
)
from benchmarks.jobs import recipe, tiny
from benchmarks.kernels import Provider, draw, plugin

VANILLA = "vanilla"
FORMS = (VANILLA, "mhc")
SECTIONS = ("decode", "graph", "prefill", "kernels")
KEYS = ("ms", "host_ms", "kernels_ms", "launches", "peak_MiB")
BACKENDS = ("hopper", "triton", "reference") if ON_GPU else ("reference",)
PROVIDERS: dict[str, Provider] = {name: functools.partial(plugin, backend=name) for name in BACKENDS}


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """As Megatron's engines call a model."""
    from megatron.core.inference.utils import InferenceMode

    with InferenceMode.active(), torch.inference_mode():
        yield


def build(form: str, options: argparse.Namespace) -> Any:
    """The GPTModel of a recipe, with random weights, on this process's device."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnBackend
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec

    from megatron_mhc import MHCConfig
    from megatron_mhc.pretrain_gpt import add_args
    from megatron_mhc.specs import wrap_block_spec

    if options.tiny:
        words = [*tiny(form), "--micro-batch-size", "1"]
    else:
        words = [*recipe(options.model, form), *["--attention-backend", options.attention]]
    if form != VANILLA:
        words += ["--mhc-recompute-layer-num", "off", "--mhc-backend", options.backend]
    before = sys.argv
    try:
        sys.argv = ["benchmarks.decode", *words, "--train-iters", "10"]  # which Megatron's parser reads
        args = parse_args(add_args)
    finally:
        sys.argv = before
    validate_args(args)
    args.padded_vocab_size = args.vocab_size + 1  # as its tokenizer's
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    model = gpt_config_from_args(args)
    if options.tiny:  # which Megatron's parser takes with --spec alone
        model.transformer.attention_backend = AttnBackend.local
    if form != VANILLA:
        layers = default_layer_spec(model, None)
        model.transformer_layer_spec = wrap_block_spec(layers, MHCConfig.from_args(args), model.transformer)
    return GPTModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups()).cuda().eval()


class Generation:
    """A model with a KV cache for `batch` sequences of `length` tokens, and the tokens."""

    def __init__(self, model: Any, batch: int, length: int):
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
            GPTInferenceWrapper,
        )

        self.context = StaticInferenceContext(batch, length)
        self.wrapper = GPTInferenceWrapper(model, self.context)
        self.wrapper.prep_model_for_inference()
        generator = torch.Generator(device="cuda" if ON_GPU else "cpu").manual_seed(1)
        most = model.vocab_size - 1
        self.words = torch.randint(most, (batch, length), generator=generator, device="cuda")
        self.given = self.wrapper.prep_inference_input(self.words)

    def forward(self, start: int, end: int) -> Tensor:
        """The logits of the last of tokens [start, end), whose keys and values go into the cache."""
        self.context.sequence_len_offset, self.context.decode_mode = start, start > 0
        return self.wrapper.run_one_forward_step(
            self.wrapper.get_batch_for_context_window(self.given, start, end)
        )

    def read(self, start: int, end: int) -> Tensor:
        """`forward`, and its likeliest token behind them."""
        logits = self.forward(start, end)
        if end < self.words.shape[1]:
            self.words[:, end] = logits[:, -1].argmax(-1)
        return logits

    def steps(self, prompt: int) -> Callable[[], Tensor]:
        """Read the prompt; returns what reads one token more with each call."""
        self.read(0, prompt)
        torch.cuda.synchronize()
        places = itertools.count(prompt)

        def step() -> Tensor:
            at = next(places)
            return self.read(at, at + 1)

        return step


class Timed:
    """What rounds of a side have taken."""

    def __init__(self) -> None:
        self.samples: dict[str, list[list[float]]] = {}
        self.once: Row = {}

    def keep(self, name: str, milliseconds: list[float]) -> None:
        self.samples.setdefault(name, []).append(milliseconds)

    def row(self, tokens: int) -> Row:
        """Args: tokens: of a step."""
        found = {name: summary(parts) for name, parts in self.samples.items()}
        row: Row = {"tokens_per_s": 1e3 * tokens / found["ms"]["median"], "ms": found["ms"]["median"]}
        row |= {"apart, %": found["ms"]["apart, %"], "host_ms": found["host_ms"]["median"], **self.once}
        if "any_ms" in row:
            row["busy"] = row["any_ms"] / row["ms"]
        return row


Round = Callable[[Any, Timed, int], None]  # of a model, what it is kept in, and its number


def take_turns(
    report: Report, section: str, name: str, models: dict[str, Any], tokens: int, rounds: int, run: Round
) -> None:
    """Rows of the models, which take turns: a round that is not kept, then `rounds`."""
    names = {form: f"{name}, {form}" for form in models}
    if all(report.row(section, title) for title in names.values()):
        return
    timed = {form: Timed() for form in models}
    failed: dict[str, Row] = {}
    for number in range(rounds + 1):
        for form, model in models.items():
            if form in failed:
                continue
            kept = timed[form] if number else Timed()

            def one(model: Any = model, kept: Timed = kept, number: int = number) -> Row:
                run(model, kept, number)
                return {}

            if "failed" in (found := attempt(one)):
                failed[form] = found
            clean()
    rows = {form: failed.get(form) or timed[form].row(tokens) for form in models}
    over(list(rows.values()), rows.get(VANILLA), KEYS)
    for form, row in rows.items():
        report.add(section, names[form], row)


@serving()
def decode(batch: int, options: argparse.Namespace, model: Any, kept: Timed, number: int) -> None:
    """A round of generating."""
    prompt, new = options.prompt, options.new
    generation = Generation(model, batch, prompt + new)
    kept.keep("ms", intervals(generation.steps(prompt), new)[1:])
    kept.keep("host_ms", host_ms(generation.steps(prompt), min(new, 16)))
    if number == options.rounds and ON_GPU:
        kept.once = gpu_work(generation.steps(prompt))


@serving()
def graph(batch: int, options: argparse.Namespace, model: Any, kept: Timed, number: int) -> None:
    """A round of replays of one step."""
    at, out = options.prompt + options.new - 1, {}
    generation = Generation(model, batch, at + 1)
    generation.forward(0, at)
    expected = generation.forward(at, at + 1).clone()

    def last() -> None:
        out["logits"] = generation.forward(at, at + 1)

    replay = captured(last)
    kept.keep("ms", intervals(replay, options.new)[1:])
    kept.keep("host_ms", host_ms(replay, 16))
    error = ((out["logits"] - expected).norm() / expected.norm()).item()
    kept.once = {"error": error, "ok": error < 0.02}


@serving()
def prefill(options: argparse.Namespace, model: Any, kept: Timed, number: int) -> None:
    """A round of reading one long prompt."""
    generation = Generation(model, 1, options.prefill)

    def read() -> Tensor:
        return generation.forward(0, options.prefill)

    read()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    kept.keep("ms", intervals(read, options.times)[1:])
    kept.once = {"peak_MiB": (torch.cuda.max_memory_allocated() - held) / 2**20}
    kept.keep("host_ms", host_ms(read, options.times))
    if number == options.rounds and ON_GPU:
        kept.once |= gpu_work(read)


def forward_of(make: Provider, drawn: list[Tensor], count: int, options: argparse.Namespace) -> Row:
    """A row of `kernels`: `count` connections, called from Python and replayed in a graph."""
    row = make(drawn, count)

    @torch.inference_mode()
    def run() -> Tensor:
        return row.forward(row.leaves[0])

    for _ in range(3):
        run()
    times, parts = 10 * options.times, {}
    parts["graph_us"] = [intervals(captured(run, 4), times)[1:] for _ in range(options.rounds)]
    parts["python_us"] = [intervals(run, times)[1:] for _ in range(options.rounds)]
    parts["host_us"] = [host_ms(run, times) for _ in range(options.rounds)]
    each = {"graph_us": 4 * count, "python_us": count, "host_us": count}
    found: Row = {name: 1e3 * summary(part)["median"] / each[name] for name, part in parts.items()}
    found["apart, %"] = summary(parts["graph_us"])["apart, %"]
    if ON_GPU:
        found["launches"] = gpu_work(run)["launches"] / count
    return found


def kernels(report: Report, options: argparse.Namespace) -> None:
    """Rows of each back end, at each number of tokens."""
    for tokens in options.tokens:
        drawn = draw(tokens, options.width, 4, torch.bfloat16, 0)
        for name, make in PROVIDERS.items():
            title = f"{tokens} tokens of {options.width}, {name}"
            run = functools.partial(forward_of, make, drawn, options.sublayers, options)
            report.run("connections, forward", title, run)
            clean()


def of_models(report: Report, sections: list[str], options: argparse.Namespace) -> None:
    """All sections but `kernels`."""
    models = {form: build(form, options) for form in FORMS}
    turn = functools.partial(take_turns, report, models=models, rounds=options.rounds)
    after = f"{options.model}, a token after {options.prompt} to {options.prompt + options.new - 1}"
    at = options.prompt + options.new - 1
    for batch in options.batches:
        if "decode" in sections:
            turn(after, f"batch {batch}", tokens=batch, run=functools.partial(decode, batch, options))
        if "graph" in sections:
            run = functools.partial(graph, batch, options)
            turn(f"{options.model}, a token after {at}, in a graph", f"batch {batch}", tokens=batch, run=run)
    if "prefill" in sections:
        name = f"{options.prefill} tokens"
        run = functools.partial(prefill, options)
        turn(f"{options.model}, prefill", name, tokens=options.prefill, run=run)


def draw_figure(report: Report, path: Path) -> None:
    """What mHC has over vanilla, of a step."""
    shown: dict[str, dict[str, float]] = {}
    for row in report.rows:
        if (value := row.get("ms over vanilla, %")) is not None:
            shown[f"{row['section']}, {row['name']}"] = {"time": value}
    if shown:
        bars(path, f"mHC over vanilla, {report.head['device']}", "% over vanilla", shown)


def main(argv: list[str] | None = None) -> None:
    parser = command_line("decode", __doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON; the figure goes beside it")
    add("--only", type=lambda text: text.split(","), default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    add("--model", choices=["llama-1b"], default="llama-1b")
    add("--backend", default="auto", help="--mhc-backend of the models")
    add("--attention", default="auto", help="--attention-backend of the models")
    add("--batches", type=numbers, default=[1, 32])
    add("--tokens", type=numbers, default=[1, 2, 8, 32, 64], help="of the section kernels")
    defaults = {"prompt": 128, "new": 64, "prefill": 4096, "rounds": 3, "times": 5}
    defaults |= {"width": 2048, "sublayers": 16}
    for name, default in defaults.items():
        add("--" + name, type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args(argv)
    if options.tiny:
        options.batches, options.prompt, options.new, options.prefill = [2], 5, 4, 16
        options.tokens, options.width, options.sublayers, options.rounds, options.times = [1], 32, 2, 1, 2
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {','.join(SECTIONS)}")
    one_rank()
    report = Report(options.out, "decode", {k: v for k, v in vars(options).items() if k != "out"})
    if set(options.only) - {"kernels"}:
        of_models(report, options.only, options)
        clean()
    if "kernels" in options.only:
        kernels(report, options)
    if options.out:
        draw_figure(report, options.out.with_suffix(".png"))
    report.end()


if __name__ == "__main__":
    main()
