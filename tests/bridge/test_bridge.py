"""Megatron-Bridge 0.6 beside the plugin: `pip install megatron-bridge`, as docs/bridge.md says for a CPU."""

import base64
import functools
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("megatron.bridge") is None, reason="needs megatron-bridge")
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def server():
    """Ends with this process, at the end of what it reads."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(Path(__file__).with_name("bridge_server.py"))]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(name, *args, world=1):
    """The result of a function of bridge_cases.py on each rank, or on the one."""
    process = server()
    print(base64.b64encode(pickle.dumps((name, world, args))).decode(), file=process.stdin, flush=True)
    line = process.stdout.readline()
    assert line, "bridge_server.py ended; what it said stands above"
    failed, answer = pickle.loads(base64.b64decode(line))
    assert not failed, answer
    return answer if world > 1 else answer[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of Hugging Face's; the first who needs it writes it."""
    return str(tmp_path_factory.mktemp("llama"))


MODELS = {
    "plain": None,
    "paper": {},
    "two_streams": dict(num_residual_streams=2, contract="sum"),
    "deepseek_v4": dict(preset="deepseek_v4"),
    "hc": dict(h_res="unconstrained"),
    "folded_head": dict(contract="learned_head", boundary="apart"),
}


@pytest.mark.parametrize("model", MODELS)
def test_hugging_face_weights_give_their_logits(folder, model):
    expected, found = ask("logits", folder, MODELS[model])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_models_with_experts_are_imported_and_exported(kind, tmp_path):
    folder = tmp_path / "hugging_face"
    folder.mkdir()
    expected, found, exported = ask("logits_with_experts", kind, str(folder), str(tmp_path / "modules"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(exported, found, rtol=0, atol=2e-4)


def test_adapters_of_bridge_train_alone_and_are_not_exported(folder):
    trained, off, refused = ask("lora", folder)
    assert len(trained) == 16 and all(".adapter." in name for name in trained)
    assert off < 2e-4 and "of an mHC model" in refused


def test_mappings_that_start_at_random_do_so_beside_imported_weights(folder):
    assert all(deviation > 0.05 for deviation in ask("random_mappings", folder))


def test_ways_to_a_dense_model_are_refused_with_the_way_to_export(folder):
    said = ask("exports", folder)
    assert said.pop("left") == "False"
    for name, message in said.items():
        assert "of an mHC model" in message and "python -m megatron_mhc.export" in message, name


REFUSED = {
    "t5": "a T5ModelProvider: take one of",
    "other": "providers of a GPTModel or HybridModel",
    "twice": "has mHC already, with num_residual_streams=2",
    "both": "not both: num_residual_streams",
    "unknown": "use_mhc: no mHC option 'streams'",
    "schedule": "pipeline_schedule=fused in Megatron-Bridge: its loop runs Megatron's schedule",
    "log_interval": "callbacks=[megatron_mhc.bridge.MHCDiagnostics(log_interval=5)]",
    "diagnostics_option": "num_residual_streams is not one of log_interval, log_tokens, alarm",
    "diagnostics_interval": "give log_interval=100",
    "decentralized": "dist.use_decentralized_pg True",
    "full_te_layer": "cannot wrap layers of Linear",
    "another_bridge": "expected ('self', 'megatron_param_name'): install megatron-bridge >=0.6.2,<0.7",
    "fsdp": "dist.use_megatron_fsdp True: use ddp.use_distributed_optimizer",
}


def test_what_cannot_be_served_is_refused_by_name(folder):
    said = ask("refusals", folder)
    assert set(said) == set(REFUSED)
    for case, message in said.items():
        assert REFUSED[case] in message, (case, message)


def test_hybrid_provider_builds_the_plain_models_function_with_mhc():
    plain, found, norm = ask("hybrid")
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3 * plain.std().item())
    assert norm == "model.norm_f.weight"


def test_copies_of_a_provider_build_the_same_model(folder):
    assert ask("copies", folder) == [8, 8, 8]


def test_layers_of_mtp_stay_plain(folder):
    loss, expected, layers = ask("mtp", folder)
    assert loss == expected and layers == ["TransformerLayer"]


def test_layers_of_mtp_stand_between_streams_where_asked(folder):
    loss, expected, layers = ask("mtp", folder, "multistream")
    assert loss == expected and layers == ["HyperConnectionTransformerLayer"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The recipe, ten steps on one process: where, and what it did."""
    out = tmp_path_factory.mktemp("trained")
    return out, ask("train", folder, str(out), 10, "", None, dict(log_interval=5))


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The same of the plain model."""
    out = tmp_path_factory.mktemp("plain")
    return out, ask("train", folder, str(out), 10, "off")


def test_recipe_trains_beside_the_plain_model(trained, plain):
    losses, plain = trained[1]["losses"], plain[1]["losses"]
    assert len(losses) == len(plain) == 10
    assert losses[0] == pytest.approx(plain[0], abs=1e-4)
    assert losses == pytest.approx(plain, abs=0.05)
    assert min(losses) < losses[0] - 0.1


def first_loss(folder, out, mhc, pretrained):
    return ask("train", folder, str(out), 1, mhc, None, None, True, str(pretrained))["losses"]


def test_training_starts_from_a_pretrained_checkpoint(folder, trained, plain, tmp_path):
    checkpoint = plain[0] / "checkpoints"
    for start, mhc in ((folder, ""), (checkpoint, "load_dense=true")):
        expected = first_loss(folder, tmp_path / f"off{mhc}", "off", start)
        assert first_loss(folder, tmp_path / f"on{mhc}", mhc, start) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(AssertionError, match="load_dense"):
        first_loss(folder, tmp_path / "refused", "", checkpoint)
    with pytest.raises(AssertionError, match="CheckpointException"):  # Megatron's own, of a missing key
        first_loss(folder, tmp_path / "back", "off", trained[0] / "checkpoints")


def resumed(folder, out, tmp_path, bf16):
    """What the steps behind the fifth did, from its checkpoint."""
    checkpoints = tmp_path / "resumed" / "checkpoints"
    shutil.copytree(out / "checkpoints", checkpoints)
    shutil.rmtree(checkpoints / "iter_0000010")
    shutil.copy(checkpoints / "iter_0000005" / "train_state.pt", checkpoints / "latest_train_state.pt")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("5")
    return ask("train", folder, str(tmp_path / "resumed"), 10, "", None, None, True, None, bf16)


def test_resumed_training_is_the_unbroken_one(folder, trained, tmp_path):
    out, whole = trained
    again = resumed(folder, out, tmp_path, False)
    assert again["losses"] == whole["losses"][5:] and len(again["losses"]) == 5
    assert again["logits"].equal(whole["logits"])


def test_bf16_training_keeps_mappings_in_fp32_and_resumes(folder, trained, tmp_path):
    whole = ask("train", folder, str(tmp_path), 10, "", None, None, True, None, True)
    assert whole["losses"] == pytest.approx(trained[1]["losses"], abs=0.05)
    for name, dtype in whole["dtypes"].items():
        assert dtype == (torch.float32 if "hyper_connection" in name else torch.bfloat16), name
    again = resumed(folder, tmp_path, tmp_path, True)
    assert again["losses"] == whole["losses"][5:] and again["logits"].equal(whole["logits"])


def test_checkpoint_is_loaded_by_its_own_record(trained):
    out, done = trained
    torch.testing.assert_close(ask("loaded", str(out / "checkpoints" / "iter_0000010")), done["logits"])


def test_checkpoint_is_exported_to_a_folder_of_the_same_logits(trained, tmp_path):
    out, done = trained
    found = ask("exported", str(out / "checkpoints"), str(tmp_path / "out"), str(tmp_path / "modules"))
    torch.testing.assert_close(found, done["logits"], rtol=0, atol=2e-4)


def test_diagnostics_are_written_at_their_steps(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "tensorboard")).Reload()
    gains = events.Scalars("mhc/composite_gain_forward")
    assert [event.step for event in gains] == [5, 10]
    assert all(0.5 < event.value < 2 for event in gains)
    assert "mhc/h_res" in events.Tags()["tensors"]


PP = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
VPP = PP | dict(virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True, batch_p2p_comm=False)
LAYOUTS = {"tp2": dict(tensor_model_parallel_size=2), "pp2": PP, "pp2_vpp2": VPP}
LEARNT = "init_gating_factor=0.5"


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Three steps on one process."""
    out = tmp_path_factory.mktemp("alone")
    return ask("train", folder, str(out), 3, LEARNT, None, None, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one_process(folder, alone, layout, tmp_path):
    ranks = ask("train", folder, str(tmp_path), 3, LEARNT, LAYOUTS[layout], None, False, world=2)
    assert ranks[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert ranks[0]["norms"] == ranks[1]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    found = ranks[0]["gradients"] | ranks[1]["gradients"]
    found.pop("output_layer.weight", None)  # the embedding's other copy
    assert found.keys() == alone["gradients"].keys()
    for name, expected in alone["gradients"].items():
        if found[name].shape == expected.shape:  # not that of a part of a weight
            torch.testing.assert_close(
                found[name], expected, rtol=0, atol=1e-5 * max(1e-3, expected.abs().max()), msg=name
            )


def test_alarm_stops_training_where_a_gain_is_out_of_range(folder, tmp_path):
    options = dict(log_interval=2, alarm="stop", alarm_logit=1.0)
    with pytest.raises(AssertionError, match="mHC alarm at step 2: stopping without saving"):
        ask("train", folder, str(tmp_path), 4, "", None, options)
    assert not list(tmp_path.glob("checkpoints/iter_*"))


def test_diagnostics_of_a_plain_model_are_refused(folder, tmp_path):
    with pytest.raises(AssertionError, match="the model has no mHC"):
        ask("train", folder, str(tmp_path), 2, "off", None, dict(log_interval=1))
