"""The converter between a GPT and the HybridModel of its layers: one function, the same bits on return."""

import argparse
import dataclasses
import functools

import pytest
import test_hybrid as hybrids
import torch
import torch.distributed as dist
from harness import Layout, build, differences, iterate
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from test_hybrid import hybrid_name, kind_of, symbols

from megatron_mhc import MHCConfig
from megatron_mhc.convert.files import convert_files
from megatron_mhc.convert.read import iteration_folder, read_torch_dist
from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing import gpt, hybrid, ranks
from megatron_mhc.testing.gpt import SMALL
from megatron_mhc.testing.parameters import fill
from megatron_mhc.testing.parity import Iteration

ERROR = 1e-10
HEAD = MHCConfig(contract="learned_head")  # the contraction has parameters too
KINDS = {
    "dense": ("*-*-", {}),
    "moe": ("*E*E", {}),
    "moe_after_dense": ("*-*E", dict(moe_layer_freq=[0, 1])),
    "mla": ("+-+-", {}),
}
METADATA = {"singleton_local_shards": False}


def gpt_model(config, mhc, vp_stage=None, **stage):
    """As `testing.gpt` builds it, with the keys that Transformer Engine's layers have in torch_dist."""
    block = gpt.spec(config, "dense", None, vp_stage)
    for layer in block.layer_specs:
        dense = "experts" not in vars(layer.submodules.mlp.keywords["submodules"])
        names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {}
        if not config.multi_latent_attention:
            names |= layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = names
    block = block if mhc is None else wrap_block_spec(block, mhc, config, vp_stage)
    sizes = SMALL.vocabulary, SMALL.sequence
    return GPTModel(config, block, *sizes, position_embedding_type="rope", vp_stage=vp_stage, **stage)


def built(model, kind, layout, mhc, pattern=None, weights=fill):
    """(config, chunks) of the GPT, or of the HybridModel of its layers."""
    whole, settings = KINDS[kind]
    layout.initialize()
    kind = kind_of(whole)
    if model == "gpt":
        config = layout.config(kind, num_layers=2, **settings)
        return config, build(layout, config, kind, mhc, weights=weights, model=gpt_model)
    pattern = pattern or whole
    more = dict(num_layers=len(symbols(pattern)), is_hybrid_model=True)
    config = layout.config(kind, **more)
    return config, build(layout, config, kind, mhc, weights=weights, model=hybrid.model(pattern, SMALL))


def iteration_of(folder):
    """A new checkpoint's folder of its only iteration."""
    iteration = folder / "iter_0000003"
    if dist.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    return iteration


def save(chunks, folder, **arguments):
    """As megatron.training lays a checkpoint out."""
    iteration = iteration_of(folder)
    common = {"args": argparse.Namespace(**arguments), "iteration": 3}
    state = {**chunks[0].module.sharded_state_dict(metadata=METADATA), **common}
    dist_checkpointing.save(state, str(iteration), content_metadata=METADATA)


def load(chunks, folder):
    """Every key that the model asks for and no other."""
    core = chunks[0].module
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.zero_()
    request = core.sharded_state_dict(metadata=METADATA)
    state = dist_checkpointing.load(request, str(iteration_folder(folder)), strict="raise_all")
    core.load_state_dict({key: state[key] for key in request})


def saved(model, kind, layout, mhc, folder, pattern=None):
    config, chunks = built(model, kind, layout, mhc, pattern)
    pattern = (pattern or KINDS[kind][0]) if model == "hybrid" else None
    save(chunks, folder, num_layers=config.num_layers, hybrid_layer_pattern=pattern)


def loaded(model, kind, layout, mhc, folder, expected, pattern=None, into=None):
    """What the model of a checkpoint does beside what it should; saved `into` a folder."""
    config, chunks = built(model, kind, layout, mhc, pattern)
    load(chunks, folder)
    if into:
        save(chunks, into, num_layers=config.num_layers, hybrid_layer_pattern=pattern or KINDS[kind][0])
    return differences(iterate(chunks, config), chunks, expected, torch.float64)


def alone(kind, mhc):
    config, chunks = built("gpt", kind, Layout(), mhc)
    return Iteration.of(iterate(chunks, config), chunks)


@functools.cache
def expected_of(kind, mhc, model="gpt"):
    """The GPT's iteration in a world of one, by the names of `model`."""
    if model == "gpt":
        return ranks.run_ranks(1, alone, kind, mhc)[0]
    whole = expected_of(kind, mhc)
    return dataclasses.replace(
        whole, gradients={hybrid_name(name): value for name, value in whole.gradients.items()}
    )


def convert(run_ranks, source, load, save, model, **more):
    return run_ranks(1, lambda: convert_files(source, "plugin", load, save, model=model, **more))[0]


def state_of(folder):
    """Tensors and objects by their keys, and the common state."""
    state, common = read_torch_dist(iteration_folder(folder))
    return {key: getattr(value, "data", value) for key, value in state.items()}, common


def assert_same(found, expected):
    assert found.keys() == expected.keys()

    def differs(a, b):
        return not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b

    assert [key for key in found if differs(found[key], expected[key])] == []


LAYOUTS = {
    "one": (1, Layout(), None),
    "tp2": (2, Layout(tp=2), None),
    "tp2_sp": (2, Layout(tp=2, sp=True), None),
    "ep2": (2, Layout(ep=2), None),
    "pp2": (2, Layout(pp=2), 1),  # of the hybrid model, whose first stage ends between attention and MLP
}
CASES = [
    *(("dense", layout) for layout in ("one", "tp2", "pp2")),
    *(("moe", layout) for layout in ("one", "tp2_sp", "ep2", "pp2")),
    *(("moe_after_dense", layout) for layout in ("one", "tp2_sp", "pp2")),
    *(("mla", layout) for layout in ("one", "tp2", "pp2")),
]


def cut(pattern, at):
    return pattern if at is None else f"{pattern[:at]}|{pattern[at:]}"


@pytest.mark.parametrize("kind, layout", CASES, ids=str)
def test_a_gpt_is_its_hybrid_twin_and_comes_back_bit_for_bit(run_ranks, tmp_path, kind, layout):
    """Saved and loaded in the layout; loss and every gradient against the GPT on one process."""
    world, sizes, at = LAYOUTS[layout]
    whole = KINDS[kind][0]
    pattern = cut(whole, at)
    run_ranks(world, saved, "gpt", kind, sizes, HEAD, tmp_path / "gpt")
    lines = convert(run_ranks, "plugin", tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    assert lines[1] == f"a HybridModel: --hybrid-layer-pattern '{whole}' in the place of --num-layers"
    expected = expected_of(kind, HEAD, "hybrid")
    there = run_ranks(
        world, loaded, "hybrid", kind, sizes, HEAD, tmp_path / "hybrid", expected, pattern, tmp_path / "saved"
    )[0]
    convert(run_ranks, "plugin", tmp_path / "saved", tmp_path / "back", "gpt")
    back = run_ranks(world, loaded, "gpt", kind, sizes, HEAD, tmp_path / "back", expected_of(kind, HEAD))[0]
    for found in (there, back):
        assert found.loss <= ERROR * (world > 1)
        # The gradient of MLA's rotary key is not summed over TP by Megatron's local modules.
        assert (kind, layout) == ("mla", "tp2") or found.worst[0] <= ERROR * (world > 1), found.worst
    (first, _), (last, common) = state_of(tmp_path / "gpt"), state_of(tmp_path / "back")
    assert_same(last, first)
    assert (common["args"].num_layers, common["args"].hybrid_layer_pattern) == (2, None)
    hybrid_args = state_of(tmp_path / "hybrid")[1]["args"]
    assert (hybrid_args.num_layers, hybrid_args.hybrid_layer_pattern) == (4, whole)


FORMS = {
    "gated": MHCConfig(preset="qwen4_exp", num_residual_streams=2, gated_rank=8),
    "previous": MHCConfig(preset="deepseek_v41"),
    "hy_v4": MHCConfig(preset="hy_v4"),
    "fixed": MHCConfig(h_res="identity", h_pre="fixed", h_post="fixed"),
}


def check_on_one_process(run_ranks, folder, kind, mhc):
    one = Layout()
    run_ranks(1, saved, "gpt", kind, one, mhc, folder / "gpt")
    convert(run_ranks, "plugin", folder / "gpt", folder / "hybrid", "hybrid")
    convert(run_ranks, "plugin", folder / "hybrid", folder / "back", "gpt")
    expected = expected_of(kind, mhc, "hybrid")
    found = run_ranks(1, loaded, "hybrid", kind, one, mhc, folder / "hybrid", expected)[0]
    assert (found.loss, found.worst[0]) == (0, 0)
    assert_same(state_of(folder / "back")[0], state_of(folder / "gpt")[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_mhc_is_that_of_the_other_model(run_ranks, tmp_path, form):
    check_on_one_process(run_ranks, tmp_path, "dense", FORMS[form])


@pytest.mark.parametrize("key", ["singleton_local_shards", "non_homogeneous_layers"])
def test_layers_that_megatron_does_not_stack_come_back_as_they_were_saved(
    run_ranks, tmp_path, monkeypatch, key
):
    monkeypatch.setitem(METADATA, key, True)
    check_on_one_process(run_ranks, tmp_path, "moe", HEAD)
    assert "decoder.layers.1.mlp.router.weight" in state_of(tmp_path / "gpt")[0]


PLAIN_SOURCES = [("gpt", "hybrid"), ("hybrid", "gpt"), ("hybrid", None), ("gpt", None)]


def plain_loss(model, kind, folder):
    config, chunks = built(model, kind, Layout(), None)
    pattern = KINDS[kind][0] if model == "hybrid" else None
    save(chunks, folder, num_layers=config.num_layers, hybrid_layer_pattern=pattern, init_method_std=0.3)
    return iterate(chunks, config)


def mhc_loss(model, kind, folder, mhc):
    """And the mappings of the converter, beside those of a new model."""
    config, chunks = built(model, kind, Layout(), mhc)
    load(chunks, folder)
    return iterate(chunks, config)


@pytest.mark.parametrize("kind", ["dense", "moe_after_dense"])
@pytest.mark.parametrize("source, target", PLAIN_SOURCES, ids=str)
def test_a_plain_model_of_either_kind_starts_mhc_in_either(run_ranks, tmp_path, source, target, kind):
    plain = run_ranks(1, plain_loss, source, kind, tmp_path / "plain")[0]
    convert(run_ranks, "plain", tmp_path / "plain", tmp_path / "mhc", target, options="init=home_stream")
    found = run_ranks(1, mhc_loss, target or source, kind, tmp_path / "mhc", MHCConfig())[0]
    assert found == pytest.approx(plain, rel=1e-4)


def test_either_way_from_plain_to_the_other_model_draws_the_same_mappings(run_ranks, tmp_path):
    """By the index of the sub-layer in the whole model, and by --init-method-std of the run."""
    run_ranks(1, plain_loss, "gpt", "dense", tmp_path / "plain")
    options = "preset=hy_v4,contract=learned_head"
    convert(run_ranks, "plain", tmp_path / "plain", tmp_path / "gpt", None, options=options)
    convert(run_ranks, "plugin", tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    convert(run_ranks, "plain", tmp_path / "plain", tmp_path / "straight", "hybrid", options=options)
    assert_same(state_of(tmp_path / "straight")[0], state_of(tmp_path / "hybrid")[0])
    drawn = [value for key, value in state_of(tmp_path / "gpt")[0].items() if key.endswith("proj.weight")]
    drawn = [value for value in drawn if value.shape[-1] == 4 * 32]
    assert len(drawn) == 3 and all(0.25 < value.std() < 0.35 for value in drawn)
    hybrid_plain = tmp_path / "hybrid_plain"
    run_ranks(1, plain_loss, "hybrid", "dense", hybrid_plain)
    convert(run_ranks, "plain", hybrid_plain, tmp_path / "native", None, options=options)
    native, straight = state_of(tmp_path / "native")[0], state_of(tmp_path / "straight")[0]
    assert native.keys() == straight.keys()
    mappings = [key for key in native if "hyper_connection" in key or "norm.head" in key]
    assert len(mappings) == 4 * 4 + 3
    assert all(torch.equal(native[key], straight[key]) for key in mappings)


def of_mixers(pattern, mhc, folder, load_from=None):
    config, chunks = hybrids.built(Layout(), pattern, mhc)
    if load_from:
        load(chunks, load_from)
    else:
        save(chunks, folder, num_layers=4, hybrid_layer_pattern=pattern)
    return iterate(chunks, config)


@pytest.mark.parametrize("pattern, kind", [("M*M-", "a Mamba layer"), ("G*G-", "a gated delta net")])
def test_a_plain_model_with_mixers_starts_with_mhc_and_stays_hybrid(run_ranks, tmp_path, pattern, kind):
    plain = run_ranks(1, of_mixers, pattern, None, tmp_path / "plain")[0]
    convert(run_ranks, "plain", tmp_path / "plain", tmp_path / "mhc", None)
    found = run_ranks(1, of_mixers, pattern, MHCConfig(), None, tmp_path / "mhc")[0]
    assert found == pytest.approx(plain, rel=1e-4)
    words = f"layer 1 is {pattern[0]}, {kind}: a GPT has only pairs .* stays a HybridModel"
    for source, folder in (("plain", "plain"), ("plugin", "mhc")):
        with pytest.raises(ranks.RankError, match=words):
            convert(run_ranks, source, tmp_path / folder, tmp_path / "none", "gpt")
    assert not (tmp_path / "none").exists()


FILE = "mp_rank_00_{:03d}/model_optim_rng.pt"


def save_torch(model, kind, layout, mhc, folder, pattern=None):
    """As --ckpt-format torch, a file for each rank."""
    config, chunks = built(model, kind, layout, mhc, pattern)
    file = iteration_of(folder) / FILE.format(dist.get_rank())
    file.parent.mkdir()
    args = argparse.Namespace(pipeline_model_parallel_size=2, num_layers=config.num_layers)
    args.hybrid_layer_pattern = pattern
    torch.save({"model": chunks[0].module.state_dict(), "args": args}, file)


def load_torch(model, kind, layout, mhc, folder, expected, pattern=None):
    config, chunks = built(model, kind, layout, mhc, pattern)
    file = iteration_folder(folder) / FILE.format(dist.get_rank())
    found = torch.load(file, weights_only=False)
    chunks[0].module.load_state_dict(found["model"])
    return differences(iterate(chunks, config), chunks, expected, torch.float64), found["args"]


def test_files_of_pipeline_stages_become_those_of_the_other_model(run_ranks, tmp_path):
    """--ckpt-format torch, whose stages keep their layers."""
    pp2 = Layout(pp=2)
    run_ranks(2, save_torch, "gpt", "dense", pp2, HEAD, tmp_path / "gpt")
    lines = convert(run_ranks, "plugin", tmp_path / "gpt", tmp_path / "hybrid", "hybrid")
    assert "--hybrid-layer-pattern '*-|*-'" in lines[1]
    expected = expected_of("dense", HEAD, "hybrid")
    there, args = run_ranks(
        2, load_torch, "hybrid", "dense", pp2, HEAD, tmp_path / "hybrid", expected, "*-|*-"
    )[0]
    assert there.loss <= ERROR and there.worst[0] <= ERROR
    assert (args.num_layers, args.hybrid_layer_pattern) == (4, "*-|*-")
    convert(run_ranks, "plugin", tmp_path / "hybrid", tmp_path / "back", "gpt")
    for rank in range(2):
        files = (iteration_folder(tmp_path / one) / FILE.format(rank) for one in ("gpt", "back"))
        first, last = (torch.load(file, weights_only=False) for file in files)
        assert_same(last["model"], first["model"])
        assert (last["args"].num_layers, last["args"].hybrid_layer_pattern) == (2, None)
    run_ranks(2, save_torch, "hybrid", "dense", pp2, HEAD, tmp_path / "cut", "*|-*-")
    with pytest.raises(ranks.RankError, match=r"pattern \*\|-\*-: a pipeline stage of it ends between"):
        convert(run_ranks, "plugin", tmp_path / "cut", tmp_path / "none", "gpt")


def plain_stages(folder):
    config, chunks = hybrids.built(Layout(pp=2), "M*|G-", None)
    file = iteration_of(folder) / FILE.format(dist.get_rank())
    file.parent.mkdir()
    args = argparse.Namespace(pipeline_model_parallel_size=2)
    torch.save({"model": chunks[0].module.state_dict(), "args": args}, file)
    return iterate(chunks, config)


def mhc_stages(folder):
    config, chunks = hybrids.built(Layout(pp=2), "M*|G-", MHCConfig())
    found = torch.load(iteration_folder(folder) / FILE.format(dist.get_rank()), weights_only=False)
    chunks[0].module.load_state_dict(found["model"])
    return iterate(chunks, config)


def test_files_of_a_plain_hybrid_model_get_the_mappings_of_their_layers(run_ranks, tmp_path):
    """Of the first stage too, which has no final norm to tell it from a GPT's; homes go on over the cut."""
    plain = run_ranks(2, plain_stages, tmp_path / "plain")[0]
    convert(run_ranks, "plain", tmp_path / "plain", tmp_path / "mhc", None)
    assert run_ranks(2, mhc_stages, tmp_path / "mhc")[0] == pytest.approx(plain, rel=1e-4)
    last = torch.load(iteration_folder(tmp_path / "mhc") / FILE.format(1), weights_only=False)["model"]
    biases = [value for key, value in last.items() if key.endswith("hyper_connection.bias")]
    assert [bias[:4].argmax().item() for bias in biases] == [2, 3]


def test_names_of_a_branch_are_had_by_way_of_a_gpt(run_ranks, tmp_path):
    """In one step: the pairs first, then the names; and back."""
    run_ranks(1, saved, "gpt", "dense", Layout(), HEAD, tmp_path / "gpt")
    convert(run_ranks, "plugin", tmp_path / "gpt", tmp_path / "hybrid", "hybrid")

    def to_branch():
        for source in ("gpt", "hybrid"):
            folders = tmp_path / source, tmp_path / f"dev_of_{source}"
            convert_files("plugin", "megatron-dev", *folders, model="gpt")

    run_ranks(1, to_branch)
    assert_same(state_of(tmp_path / "dev_of_hybrid")[0], state_of(tmp_path / "dev_of_gpt")[0])
    options = "contract=learned_head"
    convert(run_ranks, "megatron-dev", tmp_path / "dev_of_gpt", tmp_path / "back", "hybrid", options=options)
    assert_same(state_of(tmp_path / "back")[0], state_of(tmp_path / "hybrid")[0])
