"""What each release of Megatron-Core has, and the flags that main registers itself.

That a release is as its row says: tests/megatron/test_other_releases.py, with that release.
"""

import argparse
import dataclasses
import types

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_mhc import (
    MHCConfig,
    door_refusals,
    hooks,
    launch,
    parallel,
    refusals,
    releases,
    specs,
    sublayer,
)
from megatron_mhc.arguments import add_mhc_args, use_mhc
from megatron_mhc.hooks import targets, uses

OLDEST, OLD, MIDDLE, MAIN = releases.RELEASES


@pytest.fixture
def megatron(monkeypatch):
    """Let Megatron-Core be of a version, with or without hyper-connections of its own."""

    def be(version, own=False):
        monkeypatch.setattr("megatron.core.__version__", version)
        monkeypatch.setattr(releases, "find_spec", lambda name: object() if own else None)

    return be


@pytest.mark.parametrize(
    "version, own, row",
    [
        ("0.17.1", False, OLDEST),
        ("0.18.0", False, OLD),
        ("0.18.2", False, OLD),
        ("0.19.2", False, MIDDLE),
        ("0.19.0+0123abc", False, MIDDLE),
        ("0.20.0", True, MAIN),
        ("0.20.0rc0+0123abc", True, MAIN),
    ],
)
def test_a_release_is_known_by_its_version_and_by_what_it_has(megatron, version, own, row):
    megatron(version, own)
    assert releases.release() is row


@pytest.mark.parametrize(
    "version, own, words",
    [
        ("0.16.1", False, "0.16.1 is not supported: install megatron-core >=0.17.0,<0.20, or take"),
        ("0.20.0", False, "0.20.0 is not supported"),  # main's number on what is not main
        ("0.21.0", True, "0.21.0 has hyper-connections of its own"),
        ("0.19.0", True, "0.19.0 has hyper-connections of its own, as Megatron-LM's dev branch: use"),
    ],
)
def test_another_megatron_is_refused_by_what_it_is(megatron, version, own, words):
    megatron(version, own)
    with pytest.raises(ValueError, match=words):
        releases.release()


def test_what_a_release_has_otherwise_is_in_the_tables():
    rows = [*targets.HOOKS, *targets.TRAINING_HOOKS, *targets.SCHEDULE_HOOKS, *targets.FSDP_HOOKS]
    for name in vars(uses):
        rows += getattr(uses, name) if name.endswith("USES") else ()
    known = {row.target for row in rows}
    assert all(known >= set(row.symbols) for row in releases.RELEASES)


def test_the_row_of_another_release_does_not_fit_the_installed_one(monkeypatch):
    """The negative control of every test that registers."""
    hooks.register().revert()
    for row in (OLDEST, OLD, MAIN):
        monkeypatch.setattr(hooks, "release", lambda row=row: row)
        with pytest.raises(ValueError, match=r"takes .*, expected|knows no|does not exist"):
            hooks.register()


def test_packed_sequences_reach_the_mlp_where_it_takes_them(monkeypatch):
    seen = []
    layer = types.SimpleNamespace(_forward_mlp=lambda *args, **kwargs: seen.append(kwargs))
    call = sublayer.Call((), dict(packed_seq_params="packed"))
    for row in (OLD, MIDDLE):
        monkeypatch.setattr(sublayer, "_READ_BY_MLP", row.read_by_mlp)
        sublayer.mlp(layer, torch.zeros(1), call)
    assert seen == [dict(padding_mask=None), dict(padding_mask=None, packed_seq_params="packed")]


def test_what_the_oldest_release_lacks_is_refused_by_name(monkeypatch):
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    predicting, drawn = (dataclasses.replace(config) for _ in range(2))
    predicting.mtp_num_layers, drawn.cuda_graph_impl = 1, "local"
    staged = dataclasses.replace(config)
    staged.pipeline_model_parallel_size = staged.virtual_pipeline_model_parallel_size = 2
    staged.overlap_p2p_comm, staged.batch_p2p_comm = True, False
    parallel.validate(staged, MHCConfig())
    staged.deallocate_pipeline_outputs = True
    script = types.SimpleNamespace(hybrid_layer_pattern="*-*-")
    for module in (refusals, door_refusals, releases):
        monkeypatch.setattr(module, "release", lambda: OLDEST)
    parallel.validate(config, MHCConfig(mtp="multistream"))  # and no layers of it
    parallel.validate(predicting, MHCConfig())
    with pytest.raises(ValueError, match=r"--mhc-mtp multistream with --mtp-num-layers under .* 0\.17"):
        parallel.validate(predicting, MHCConfig(mtp="multistream"))
    with pytest.raises(ValueError, match=r"--cuda-graph-impl local under Megatron-Core 0\.17: install"):
        parallel.validate(drawn, MHCConfig())
    with pytest.raises(ValueError, match=r"virtual pipeline stages with overlapped p2p under Megatron"):
        parallel.validate(staged, MHCConfig())
    parallel.validate(staged, MHCConfig(pipeline_schedule="interleaved"))
    with pytest.raises(ValueError, match=r"--hybrid-layer-pattern \*-\*- is of a HybridModel"):
        refusals.refuse(door_refusals.ENTRY_POINT, script)
    with pytest.raises(ValueError, match="has no HybridModel: install"):
        specs.NoHybridModel().module  # as a script that takes it for a spec  # noqa: B018


@pytest.fixture
def mains_parser(monkeypatch):
    """A parser as main makes it, extended by ours."""
    monkeypatch.setattr("megatron_mhc.arguments.release", lambda: MAIN)

    def make():
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--spec", nargs="*")
        group = parser.add_argument_group("transformer configuration")
        group.add_argument("--enable-mhc-connections", action="store_true")
        for name, type_, default in (
            ("num-residual-streams", int, 4),
            ("sinkhorn-iterations", int, 20),
            ("init-gating-factor", float, 0.01),
            ("recompute-layer-num", int, None),
        ):
            dest = f"mhc_{name.replace('-', '_')}"
            group.add_argument(f"--mhc-{name}", dest=dest, type=type_, default=default)
        return add_mhc_args(parser)

    return make


def test_flags_that_main_has_too_are_ours_while_its_own_mhc_is_off(mains_parser):
    words = "--mhc-num-residual-streams 2 --mhc-recompute-layer-num auto --mhc-preset deepseek_v4"
    args = mains_parser().parse_args(words.split())
    expected = MHCConfig(num_residual_streams=2, recompute_layer_num="auto", preset="deepseek_v4")
    assert MHCConfig.from_args(args) == expected
    assert MHCConfig.from_args(mains_parser().parse_args([])) == MHCConfig()


def test_flags_that_main_has_too_are_its_own_while_its_own_mhc_is_on(mains_parser):
    words = "--mhc-num-residual-streams 2 --mhc-recompute-layer-num 3 --enable-mhc-connections"
    args = mains_parser().parse_args(words.split())
    found = args.mhc_num_residual_streams, args.mhc_sinkhorn_iterations, args.mhc_init_gating_factor
    assert found == (2, 20, 0.01) and args.mhc_recompute_layer_num == 3  # layers
    model = types.SimpleNamespace(transformer_layer_spec="Megatron's")
    use_mhc(args, model)
    assert model.transformer_layer_spec == "Megatron's"


def test_a_word_of_ours_is_refused_by_name_for_mains_own_mhc(mains_parser, capsys):
    with pytest.raises(SystemExit):
        mains_parser().parse_args(["--enable-mhc-connections", "--mhc-recompute-layer-num", "auto"])
    said = capsys.readouterr().err
    assert "--mhc-recompute-layer-num: auto is not for Megatron's own mHC" in said
    args = mains_parser().parse_args(["--enable-mhc-connections", "--mhc-preset", "paper"])
    with pytest.raises(ValueError, match="--enable-mhc-connections .* has no --mhc-preset: drop either"):
        use_mhc(args, types.SimpleNamespace(transformer_layer_spec=None))


def test_a_script_with_two_flags_of_one_name_is_still_an_error(monkeypatch):
    monkeypatch.setattr("megatron_mhc.arguments.release", lambda: MIDDLE)
    parser = argparse.ArgumentParser()
    parser.add_argument("--mhc-num-residual-streams")
    with pytest.raises(argparse.ArgumentError, match="conflicting"):
        add_mhc_args(parser)


@pytest.mark.parametrize("switch", releases.OWN_SWITCHES)
def test_megatrons_own_mhc_is_refused_beside_ours(switch):
    said = f"--{switch.replace('_', '-')} turns on Megatron's own mHC"
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    setattr(config, switch, True)
    with pytest.raises(ValueError, match=said):
        parallel.validate(config, MHCConfig())
    for door in (door_refusals.SPEC_DOOR, door_refusals.ENTRY_POINT):
        with pytest.raises(ValueError, match=said):
            refusals.refuse(door, types.SimpleNamespace(**{switch: True}))
    with pytest.raises(ValueError, match=said):
        launch.prepare([__file__, said.split()[0]])  # any script that exists


def test_a_flag_of_mains_beside_the_spec_is_not_ignored(monkeypatch):
    """An unmodified script of main's reads the flag, for its own mHC."""

    @dataclasses.dataclass
    class MainsConfig:
        mhc_num_residual_streams: int = 4

    module = "megatron.core.transformer.transformer_config.TransformerConfig"
    monkeypatch.setattr(module, MainsConfig)
    refusals.refuse(door_refusals.SPEC_DOOR, types.SimpleNamespace(mhc_num_residual_streams=4))
    with pytest.raises(ValueError, match="--mhc-num-residual-streams 2 is here a flag of Megatron's own mHC"):
        refusals.refuse(door_refusals.SPEC_DOOR, types.SimpleNamespace(mhc_num_residual_streams=2))
