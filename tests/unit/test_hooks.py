"""register / revert / report: idempotent, reversible, and closed to anything it was not written for."""

import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig

import megatron_mhc
from megatron_mhc import contraction, hooks, parallel, releases
from megatron_mhc.gated import GatedConnection
from megatron_mhc.hooks import targets, uses
from megatron_mhc.hooks.optimizer import (
    detach_float32_shards,
    explain_other_layout,
    lend_main_gradients,
    load_by_masters,
    master_every_parameter,
    number_all_parameters,
    number_float32_first,
    save_current_float32,
)
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.mapping_parameters import are_ours
from megatron_mhc.pipeline import buffers


@pytest.fixture(autouse=True)
def reverted():
    hooks.revert_all()
    yield
    hooks.revert_all()


def current():
    """Every replaced symbol, as it is stored."""
    return [inspect.getattr_static(*owner_and_name(hook)) for hook in targets.HOOKS]


def owner_and_name(hook):
    return hooks._find(hook.target)[:2]


def test_symbols_are_replaced_until_every_registration_is_reverted():
    before = current()
    first = megatron_mhc.register()
    replaced = current()
    assert all(new is not old for new, old in zip(replaced, before, strict=True))
    second = megatron_mhc.register()
    assert current() == replaced
    second.revert()
    second.revert()
    assert current() == replaced and first.active and not second.active
    assert "not registered" not in first.report()
    first.revert()
    assert current() == before
    assert "not registered" in first.report()


def test_with_block_in_a_registered_program_leaves_the_outer_registration():
    before = current()
    outer = megatron_mhc.register()
    with megatron_mhc.register():
        pass
    assert all(new is not old for new, old in zip(current(), before, strict=True))
    outer.revert()
    assert current() == before


@pytest.mark.parametrize("doors_first", [False, True])
def test_doors_join_a_with_block_and_stay_without_one(doors_first):
    before = current()
    if doors_first:
        hooks.require()
    with megatron_mhc.register():
        hooks.require()
        hooks.require(schedule=True)
        assert current() != before
    assert (current() != before) == doors_first


def patch(monkeypatch):
    """Somebody else's patch of P2PCommunicator._communicate, which calls what it found."""
    found = P2PCommunicator._communicate

    @functools.wraps(found)
    def foreign(*args, **kwargs):
        return found(*args, **kwargs)

    monkeypatch.setattr(P2PCommunicator, "_communicate", foreign)
    return foreign


def message():
    """Ask for a message that mHC refuses, of a communicator whose model asks for another schedule."""
    config = types.SimpleNamespace(
        mhc=megatron_mhc.MHCConfig(pipeline_schedule="fused"),
        hidden_size=8,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=False,
        use_ring_exchange_p2p=False,
        batch_p2p_comm=False,
        timers=None,
    )
    communicator = types.SimpleNamespace(config=config)
    nothing = dict.fromkeys(("tensor_send_next", "tensor_send_prev"))
    P2PCommunicator._communicate(
        communicator, **nothing, recv_prev=False, recv_next=False, tensor_shape=(1, 1, 8)
    )


def is_ours():
    """Whether a pipeline message goes through the hook; Megatron's own code fails on the stand-in."""
    try:
        message()
    except ValueError:
        return True
    except AttributeError:
        return False
    raise AssertionError("neither refused it")


def test_revert_under_a_foreign_patch_keeps_the_patch_and_ends_what_is_ours(monkeypatch):
    before = current()
    handle = megatron_mhc.register()
    with monkeypatch.context() as foreign:
        on_top = patch(foreign)
        assert is_ours()
        handle.revert()
        assert P2PCommunicator._communicate is on_top and not is_ours()
        assert current()[1:] == before[1:]
    assert not is_ours()  # what the patch put back is switched off


@pytest.mark.parametrize("taken_off", [False, True])
def test_register_after_a_revert_under_a_foreign_patch(monkeypatch, taken_off):
    before = current()
    handle = megatron_mhc.register()
    with monkeypatch.context() as foreign:
        on_top = patch(foreign)
        handle.revert()
        if not taken_off:
            with megatron_mhc.register():
                assert P2PCommunicator._communicate is on_top and is_ours()
            assert not is_ours()
    with megatron_mhc.register():
        assert is_ours()
    assert current() == before


def test_another_patch_after_a_revert_under_a_foreign_one_is_refused(monkeypatch):
    handle = megatron_mhc.register()
    patch(monkeypatch)
    handle.revert()
    on_top = patch(monkeypatch)
    with pytest.raises(ValueError, match="_communicate was replaced by"):
        megatron_mhc.register()
    assert P2PCommunicator._communicate is on_top and not is_ours()


def test_a_symbol_that_somebody_put_back_is_replaced_again():
    before = P2PCommunicator._communicate
    megatron_mhc.register()
    P2PCommunicator._communicate = before
    megatron_mhc.register()
    assert is_ours()
    hooks.revert_all()
    assert P2PCommunicator._communicate is before


def test_threads_that_register_at_once_leave_megatron_as_it_is():
    before, threads, rounds = current(), 8, 25
    together = threading.Barrier(threads, timeout=60)
    failed = []

    def work():
        for _ in range(rounds):
            together.wait()
            with megatron_mhc.register():
                if any(new is old for new, old in zip(current(), before, strict=True)):
                    failed.append("not replaced")
            together.wait()
            if current() != before:
                failed.append("not restored")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and current() == before


def test_report_names_every_symbol_and_its_reason():
    report = megatron_mhc.register().report()
    for hook in targets.HOOKS:
        assert hook.target in report and hook.reason in report


def small(**settings):
    sizes = dict(num_layers=1, hidden_size=32, num_attention_heads=2)
    return TransformerConfig(**sizes, use_cpu_initialization=True, **settings)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "auto runs reference, since the streams are on cpu"),
        (dict(backend="reference"), "reference runs reference"),
        (dict(backend="triton"), "triton runs triton"),  # in the interpreter
        (dict(backend="triton", pp_boundary="split", pipeline_schedule="fused"), "triton runs triton"),
    ],
)
def test_report_says_which_operations_the_models_run(options, words):
    gc.collect()
    assert "no connection is built yet" in megatron_mhc.register().report()
    config = small()
    mhc = megatron_mhc.MHCConfig(num_residual_streams=2, **options)
    connections = [HyperConnectionModule(config, mhc, k) for k in range(2)]
    (line,) = [line for line in megatron_mhc.register().report().splitlines() if "connections of" in line]
    assert line.startswith("  2 connections of 2 streams of 32 channels, torch.float32, cpu: ")
    assert words in line
    del connections


@pytest.mark.parametrize("saved", [[[], [2.0]], [[2.0]]], ids=["torch", "torch_dist"])
def test_masters_are_found_whether_or_not_a_format_keeps_empty_groups(saved):
    """Of a group of fp32 parameters alone."""
    connection = HyperConnectionModule(small(), megatron_mhc.MHCConfig(), 0)
    optimizer = stub(connection.affine)
    groups = [[], optimizer.float16_groups[0]]
    optimizer.float16_groups, optimizer.fp32_from_float16_groups = groups, [[], [1.0]]

    def load(self, state_dict):  # pairs them as Megatron does
        pairs = zip(self.fp32_from_float16_groups, state_dict["fp32_from_fp16_params"], strict=False)
        return [pair for groups in pairs for pair in zip(*groups, strict=False)]

    state = {"optimizer": {}, "fp32_from_fp16_params": saved}
    assert load_by_masters(load)(optimizer, state) == [(1.0, 2.0)]
    assert len(optimizer.float16_groups) == 1


def stub(float32):
    """An optimizer of a bf16 parameter and this fp32 one, by all names under which Megatron's have them."""
    half = torch.ones(2, dtype=torch.bfloat16)
    params = [half, float32]
    return types.SimpleNamespace(
        float16_groups=[[half]],
        fp32_from_float16_groups=[[half.float()]],
        fp32_from_fp32_groups=[[float32]],
        param_groups=[{"params": params}],
        optimizer=types.SimpleNamespace(param_groups=[{"params": params}]),
        param_update_in_fp32=True,
    )


def numbered(optimizer):
    ranges = [{"params": list(optimizer.param_groups[0]["params"])}]
    build = number_float32_first(lambda param_groups, gbuf_ranges: ({}, ranges))
    build(None, optimizer.param_groups, [])
    return ranges[0]["params"][0] is optimizer.param_groups[0]["params"][0]


def sharded(optimizer):
    try:
        return number_all_parameters(lambda *args: "stock")(optimizer, {}) == "stock"
    except AttributeError:  # went on, and found no `state_dict`
        return False


def attached(optimizer):
    shard = torch.nn.Parameter(optimizer.fp32_from_fp32_groups[0][0].detach().clone()).view(-1)
    shards = [[shard]]
    group_ranges = [{"orig_group": optimizer.param_groups[0]}]
    build = detach_float32_shards(lambda *args: (None, None, None, shards, None))
    build(None, [], {}, group_ranges, None)
    return shards[0][0] is shard


def without_main_gradient(optimizer):
    seen = []
    parameter = optimizer.fp32_from_fp32_groups[0][0]
    lend_main_gradients(lambda self: seen.append(hasattr(parameter, "main_grad")))(optimizer)
    return seen == [False]


def divided(optimizer):
    groups = [{"params": list(optimizer.param_groups[0]["params"])}]
    master_every_parameter(lambda *args: (None, groups, {}, None, {}))(optimizer, 0.5)
    return all(a is b for a, b in zip(groups[0]["params"], optimizer.param_groups[0]["params"], strict=True))


def unexplained(optimizer):
    def load(self, state_dict):
        raise KeyError("state")

    try:
        chained = types.SimpleNamespace(chained_optimizers=[optimizer])
        explain_other_layout(load)(chained, {})
    except (KeyError, ValueError) as error:
        return type(error) is KeyError


def as_it_was(optimizer):
    optimizer.float16_groups.append([])
    load_by_masters(lambda *args: None)(optimizer, {})
    return len(optimizer.float16_groups) == 2


@pytest.mark.parametrize(
    "is_stock", [numbered, sharded, attached, without_main_gradient, divided, unexplained, as_it_was]
)
def test_a_plain_models_optimizer_is_megatrons_beside_a_model_with_mappings(is_stock):
    connection = HyperConnectionModule(small(), megatron_mhc.MHCConfig(), 0)
    assert is_stock(stub(torch.nn.Parameter(torch.ones(2))))
    assert not is_stock(stub(connection.affine))


@pytest.mark.parametrize("is_stock", [sharded, without_main_gradient, unexplained, as_it_was])
def test_float32_parameters_beside_mappings_of_the_models_dtype_are_known(is_stock):
    """Of the gated residual, whose matrices are bf16; a router's may be fp32."""
    connection = GatedConnection(small(), megatron_mhc.MHCConfig(preset="qwen4_exp"), 0)
    optimizer = stub(torch.nn.Parameter(torch.ones(2)))
    optimizer.float16_groups[0].append(connection.read_up.weight)
    assert not is_stock(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_models_mappings_are_known(copied):
    connection = copied(HyperConnectionModule(small(), megatron_mhc.MHCConfig(), 0))
    assert are_ours([connection.affine])


def test_the_parameters_of_a_librarys_contraction_are_beside_mappings():
    class Mean(torch.nn.Module):
        def __init__(self, config, mhc):
            super().__init__()
            self.weight, self.n = torch.nn.Parameter(torch.ones(1)), mhc.num_residual_streams

        def forward(self, streams):
            return streams.unflatten(-1, (self.n, -1)).mean(-2) * self.weight

    built = contraction.build(Mean, small(), megatron_mhc.MHCConfig())
    assert are_ours([built.weight]) and not are_ours([torch.ones(1)])


def set_symbols(path):
    """What a file assigns to, or sets, of what it has imported of Megatron, as `name.attribute`."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron"
        for alias in node.names
    }
    for node in ast.walk(tree):
        places = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            places = [ast.Attribute(node.args[0], ast.unparse(node.args[1]))]
        for place in places:
            if isinstance(place, ast.Attribute) and getattr(place.value, "id", "") in imported:
                yield f"{place.value.id}.{place.attr}"


def test_every_symbol_that_is_replaced_stands_in_the_table():
    """But for what its docstring names: of pretrain_gpt.py, and of testing/."""
    package = Path(megatron_mhc.__file__).parent
    found = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path.parent.name != "testing"
        for name in set_symbols(path)
    }
    assert found == {"pretrain_gpt.py: utils.compile_helpers"}


def test_a_buffer_is_new_in_fused_steps_alone(monkeypatch):
    from megatron.core.utils import GlobalMemoryBuffer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    buffer, shape = GlobalMemoryBuffer(), ((2, 3), torch.float32, "x")
    with pytest.raises(RuntimeError, match="the hooks of megatron_mhc.register"), buffers.own_buffers():
        pass
    with megatron_mhc.register():
        shared = buffer.get_tensor(*shape)
        with buffers.own_buffers():
            first = buffer.get_tensor(*shape)
            with buffers.own_buffers():
                second = buffer.get_tensor(*shape)
            third = buffer.get_tensor(*shape, mem_alloc_context=contextlib.nullcontext)
        assert buffer.get_tensor(*shape).data_ptr() == shared.data_ptr()
    assert len({t.data_ptr() for t in (shared, first, second, third)}) == 4


@pytest.mark.parametrize("place", [parallel._DATA_PARALLEL, parallel._MEGATRON_FSDP, parallel._FSDP2])
def test_what_gathers_parameters_is_checked_where_it_is_looked_for(place):
    rows = [row for row in (*uses.USES, *uses.FSDP_USES) if row.target.startswith(place + ":")]
    assert rows
    hooks.check_uses(tuple(rows))


def test_a_plain_models_float32_master_is_saved_as_megatron_saves_it():
    config = types.SimpleNamespace(use_precision_aware_optimizer=True, optimizer_cpu_offload=False)
    master = torch.zeros(2)
    get = save_current_float32(lambda self, model_param: {"param": master})
    connection = HyperConnectionModule(small(), megatron_mhc.MHCConfig(), 0)
    for parameter in (torch.ones(2), connection.affine):
        optimizer = types.SimpleNamespace(
            config=config,
            model_param_group_index_map={parameter: (0, 0)},
            optimizer=types.SimpleNamespace(param_groups=[{"params": [parameter]}]),
        )
        saved = get(optimizer, parameter)["param"]
        assert saved.equal(parameter) if parameter is connection.affine else saved is master


def test_report_goes_by_the_dtype_of_the_streams():
    gc.collect()
    config = small(params_dtype=torch.bfloat16, fp32_residual_connection=True)
    connection = HyperConnectionModule(config, megatron_mhc.MHCConfig(), 0)
    assert "4 streams of 32 channels, torch.float32, cpu: " in megatron_mhc.register().report()
    del connection
    with pytest.raises(ValueError, match="hopper: the streams are torch.float32"):
        HyperConnectionModule(config, megatron_mhc.MHCConfig(backend="hopper"), 0)


@pytest.mark.parametrize(
    "backend, gpu, words",
    [
        ("auto", (9, 0, 132), "auto runs hopper"),
        ("auto", (8, 0, 108), "auto runs triton"),
        ("hopper", (9, 0, 132), "hopper runs hopper"),
        ("hopper", (8, 0, 108), "hopper runs none, --mhc-backend hopper: the GPU's compute capability"),
    ],
)
def test_report_says_whether_hopper_runs(monkeypatch, backend, gpu, words):
    monkeypatch.setattr(megatron_mhc.backend, "_gpu", lambda: gpu)
    monkeypatch.setattr(megatron_mhc.backend, "_has_cuda_bindings", lambda: True)
    config = small(params_dtype=torch.bfloat16)
    connection = HyperConnectionModule(config, megatron_mhc.MHCConfig(backend=backend), 0)
    on_gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(connection, "parameters", lambda: iter([on_gpu]))
    assert words in megatron_mhc.register().report()
    del connection


def test_report_says_that_triton_cannot_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    config = small()
    connection = HyperConnectionModule(config, megatron_mhc.MHCConfig(backend="triton"), 0)
    assert (
        "triton runs none, --mhc-backend triton: the streams are on cpu" in megatron_mhc.register().report()
    )
    del connection


@pytest.mark.parametrize("number", ["0.15.3", "0.16.1", "0.20.0", "1.0"])
def test_unsupported_version_is_refused(monkeypatch, number):
    before = current()
    monkeypatch.setattr("megatron.core.__version__", number)
    with pytest.raises(ValueError, match=f"megatron-core {number} is not supported: install"):
        megatron_mhc.register()
    assert current() == before


@pytest.mark.parametrize("number", ["0.19.0", "0.19.2", "0.19.0+0123abc"])
def test_supported_version_is_accepted(monkeypatch, number):
    monkeypatch.setattr("megatron.core.__version__", number)
    assert megatron_mhc.register().active


def test_core_with_its_own_hyper_connections_is_refused(monkeypatch):
    monkeypatch.setattr(releases, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="has hyper-connections of its own"):
        megatron_mhc.register()


def test_foreign_patch_is_refused_and_left_alone(monkeypatch):
    foreign = patch(monkeypatch)
    with pytest.raises(ValueError, match="_communicate was replaced by"):
        megatron_mhc.register()
    assert P2PCommunicator._communicate is foreign


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(parameters=("self", "other")), "expected .*'other'.*install megatron-core"),
        (
            dict(target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._gone"),
            "_gone does not exist",
        ),
    ],
)
def test_changed_megatron_is_refused_before_anything_is_replaced(monkeypatch, change, words):
    before = current()
    changed = (*targets.HOOKS[1:], dataclasses.replace(targets.HOOKS[0], **change))
    monkeypatch.setattr(hooks, "HOOKS", changed)
    with pytest.raises(ValueError, match=words):
        megatron_mhc.register()
    assert current() == before


def check_all():
    megatron_mhc.register(training=True, schedule=True)
    hooks.check_uses(LATER)


LATER = uses.HYBRID_USES + uses.SPEC_USES + uses.PRETRAIN_USES
ROWS = uses.USES + uses.TRAINING_USES + uses.SCHEDULE_USES + LATER


@pytest.mark.parametrize("use", ROWS, ids=lambda use: use.target)
def test_changed_symbol_that_is_used_is_refused_before_anything_is_replaced(monkeypatch, use):
    check_all()
    hooks.revert_all()
    before = current()
    owner, name, found = hooks._find(use.target)
    if hooks._is_somebody_elses(found):
        pytest.skip("testing.cpu has replaced it")

    def changed(): ...

    if code := getattr(inspect.unwrap(found), "__code__", None):
        changed.__module__ = found.__module__
        changed.__code__ = changed.__code__.replace(co_filename=code.co_filename)
    if use.parameters is not None:
        with monkeypatch.context() as patched:
            changed.__signature__ = inspect.Signature(
                [inspect.Parameter("changed", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
            )
            patched.setattr(owner, name, changed)
            with pytest.raises(
                ValueError, match=rf"{use.target}, of .*'changed'.*: install (megatron-core|another torch)"
            ):
                check_all()
    for gone in use.names:
        with monkeypatch.context() as patched:
            plain = inspect.unwrap(found)
            other = types.FunctionType(without(plain.__code__, gone), {}, closure=plain.__closure__)
            other.__signature__ = inspect.signature(found)
            other.__module__ = found.__module__
            patched.setattr(owner, name, other)
            with pytest.raises(ValueError, match=f"{use.target} knows no {gone}: install"):
                check_all()
    if name not in ("__init__", "forward"):  # every module has one
        with monkeypatch.context() as patched:
            patched.delattr(owner, name)
            with pytest.raises(ValueError, match=f"{use.target} does not exist: install"):
                check_all()
    assert use in LATER or current() == before


def test_a_symbol_that_is_used_may_be_wrapped_by_somebody_else(monkeypatch):
    original = torch.nn.Module._apply

    def wrapped(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    wrapped.__module__ = original.__module__
    monkeypatch.setattr(torch.nn.Module, "_apply", wrapped)
    check_all()


def without(code, name):
    """Code that reads and sets another attribute in the place of `name`."""
    constants = (
        without(c, name) if isinstance(c, types.CodeType) else None if c == name else c
        for c in code.co_consts
    )
    return code.replace(
        co_names=tuple("other" if n == name else n for n in code.co_names), co_consts=tuple(constants)
    )
