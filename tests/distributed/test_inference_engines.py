"""Megatron's inference engines: batches of prompts of several lengths, greedy, in parallel layouts."""

import itertools

import engines
import pytest
import torch
from engines import CASES, NEW, OPTIONS, PROMPTS, Numbers
from harness import Layout, build


def serve(layout, kind, mhc, dynamic):
    """What Megatron's engine says of all prompts."""
    layout.initialize()
    # The other dispatcher, Megatron's default, needs NVLink's multicast.
    config = layout.config(kind, params_dtype=torch.float32, inference_moe_token_dispatcher_type="nccl")
    return engines.serve(build(layout, config, kind, mhc)[0].module.eval(), config, dynamic)


def training_forward(kind, mhc):
    """Greedy tokens by whole passes, each prompt by itself, and the logarithms of their probabilities."""
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, params_dtype=torch.float32)
    model = build(layout, config, kind, mhc)[0].module
    out = []
    for prompt in PROMPTS:
        ids, chosen = Numbers().tokenize(prompt), []
        for _ in range(NEW):
            length = len(ids)
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
            with torch.no_grad():
                scores = model(torch.tensor([ids]), torch.arange(length)[None], mask)[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            chosen.append(scores.max().item())
            if ids[-1] == Numbers.eod:  # which ends a text and is no part of it
                break
        found = [word for word in ids[-len(chosen) :] if word != Numbers.eod]
        out.append((found, chosen[: len(found)]))
    return out


NOW = {
    ("static", "one", "stock"),
    ("static", "tp2_pp2", "mhc"),
    ("static", "pp2_mla", "v4"),
    ("static", "ep2", "mhc"),
    ("dynamic", "one", "stock"),
    ("dynamic", "tp2_pp2_sp", "mhc"),
    ("dynamic", "pp2_tied", "v4"),
    ("dynamic", "ep2", "mhc"),
}


def cases():
    """Every engine, layout and form; most of them slow."""
    for engine, case, mhc in itertools.product(("static", "dynamic"), CASES, OPTIONS):
        if engine == "static" and CASES[case][1].sp or engine == "dynamic" and CASES[case][0] == "mla":
            continue  # Megatron's static engine knows no sequence parallelism, its dynamic MLA is FlashMLA's
        marks = () if (engine, case, mhc) in NOW else pytest.mark.slow
        yield pytest.param(engine, case, mhc, marks=marks)


@pytest.mark.parametrize("engine, case, mhc", cases())
def test_engine_says_what_the_training_forward_finds_likeliest(run_ranks, engine, case, mhc):
    """Texts and the logarithms of their probabilities, of each prompt by itself in whole passes."""
    kind, layout = CASES[case]
    expected = run_ranks(1, training_forward, kind, OPTIONS[mhc])[0]
    ranks = layout.tp * layout.pp * layout.ep
    for found in run_ranks(ranks, serve, layout, kind, OPTIONS[mhc], engine == "dynamic"):
        assert [ids[: len(want)] for (ids, _), (want, _) in zip(found, expected, strict=True)] == [
            want for want, _ in expected
        ]
        for (_, got), (_, want) in zip(found, expected, strict=True):
            assert got[: len(want)] == pytest.approx(want, abs=1e-5)
