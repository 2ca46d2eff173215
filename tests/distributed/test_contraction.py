"""A contraction of the streams that a library brings: in every layout as in one process, in checkpoints."""

import functools

import pytest
import test_checkpoint as checkpoints
import torch
from harness import Layout, _reference, build, compare, global_parameters, gpt
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mhc import MHCConfig
from megatron_mhc.specs import wrap_block_spec, wrap_hybrid_spec
from megatron_mhc.testing import hybrid

MHC = MHCConfig(num_residual_streams=2, contract="library")
WIDTH = 32


class Weighted(torch.nn.Module):
    """A weight for each stream and channel, in front of the final norm."""

    def __init__(self, config, mhc):
        super().__init__()
        shape = mhc.num_residual_streams, config.hidden_size
        self.weight = torch.nn.Parameter(torch.full(shape, 0.5, dtype=config.params_dtype))

    def forward(self, streams):
        return (streams.unflatten(-1, self.weight.shape) * self.weight).sum(-2)


class Replacing(Weighted):
    """It normalises by itself, so that no norm follows."""

    replaces_norm = True

    def forward(self, streams):
        hidden = super().forward(streams)
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1.0)


def by(contraction, run, *args, **kwargs):
    """Run on this rank with a model that has this contraction."""
    gpt.wrap_block_spec = functools.partial(wrap_block_spec, contraction=contraction)
    return run(*args, **kwargs)


@functools.cache
def expected(run_ranks, contraction):
    return run_ranks(1, by, contraction, _reference, "dense", MHC, torch.float64)[0]


LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
}


@pytest.mark.parametrize("contraction", [Weighted, Replacing])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_supplied_contraction_matches_single_process(run_ranks, layout, contraction):
    one = expected(run_ranks, contraction)
    result = run_ranks(2, by, contraction, compare, LAYOUTS[layout], "dense", MHC, one)[0]
    assert result.loss <= 1e-10
    assert result.worst[0] <= 1e-10, result.worst
    name = "decoder.final_layernorm.contraction.weight"
    assert one.gradients[name].shape == (2, WIDTH) and one.gradients[name].abs().max() > 1e-6
    assert ("decoder.final_layernorm.norm.weight" in one.gradients) is (contraction is Weighted)


def unmark(parameter, name):
    if "contraction" in name:
        parameter.sequence_parallel = False


def test_unreduced_gradients_of_a_contraction_are_noticed(run_ranks):
    one, layout = expected(run_ranks, Weighted), Layout(tp=2, sp=True)
    result = run_ranks(2, by, Weighted, compare, layout, "dense", MHC, one, None, unmark)[0]
    wrong = [name for name, error in result.gradients.items() if error > 1e-3]
    assert wrong == ["decoder.final_layernorm.contraction.weight"]


@pytest.mark.parametrize("contraction", [Weighted, Replacing])
def test_training_with_a_supplied_contraction_is_resharded(run_ranks, tmp_path, contraction):
    legs = [(2, Layout(tp=2, sp=True)), (2, Layout(pp=2)), (1, Layout())]
    train = functools.partial(by, contraction, checkpoints.train, mhc=MHC)
    history = checkpoints.in_legs(run_ranks, tmp_path, "dense", legs, train)
    whole = run_ranks(1, train, Layout(), "dense", torch.float32, range(6))[0]
    checkpoints.check(history, whole, checkpoints.FLOAT32_ERROR, moved=5e-3)


def built(contraction, mhc=MHC):
    """The final norm of a model on one rank; the text of the error where it is refused."""
    layout = Layout()
    layout.initialize()
    try:
        [chunk] = by(contraction, build, layout, layout.config("dense"), "dense", mhc)
    except ValueError as error:
        return str(error)
    found = checkpoints.unwrap(chunk)
    marks = {name: p.sequence_parallel for name, p in found.named_parameters() if "contraction" in name}
    final = found.decoder.final_layernorm
    entries = set(final.state_dict()) | {key for key in final.sharded_state_dict()}
    return sorted(entries), marks


def of_function(config, mhc):
    return Weighted(config, mhc)


def test_a_contraction_is_a_class_a_function_or_a_spec(run_ranks):
    for contraction in (Weighted, of_function, ModuleSpec(module=Weighted)):
        entries, marks = run_ranks(1, built, contraction)[0]
        assert entries == ["_extra_state", "contraction.weight", "norm.weight"]
        assert marks == {"decoder.final_layernorm.contraction.weight": False}


def test_keys_of_a_checkpoint_are_the_same_without_a_contraction(run_ranks):
    head = ["head.alpha", "head.bias", "head.mapping_proj.weight"]
    for contract, more in (("mean", []), ("sum", []), ("learned_head", head)):
        entries, _ = run_ranks(1, built, None, MHCConfig(contract=contract))[0]
        assert entries == sorted(["_extra_state", "norm.weight", *more])


class Sum(Weighted):
    """Of what replaces the norm, nothing in a checkpoint."""

    replaces_norm = True

    def __init__(self, config, mhc):
        torch.nn.Module.__init__(self)
        self.weight = torch.ones(mhc.num_residual_streams, config.hidden_size, dtype=config.params_dtype)


class Wide(Weighted):
    def forward(self, streams):
        return streams


class Pair(Weighted):
    def forward(self, streams):
        return super().forward(streams), streams


REFUSED = {
    "of_another_shape": (
        Wide,
        MHC,
        r"contraction=Wide makes \(2, 1, 64\) of streams \(2, 1, 64\).*return \[",
    ),
    "of_no_tensor": (Pair, MHC, "contraction=Pair makes tuple of streams"),
    "a_built_module": (torch.nn.Identity(), MHC, "contraction=Identity: give a class, a function or"),
    "no_builder": ("mean", MHC, "contraction=str: give a class, a function or a ModuleSpec"),
    "of_other_arguments": (
        torch.nn.Linear,
        MHC,
        "contraction=Linear cannot be called so, missing a required",
    ),
    "a_function_of_no_module": (lambda config, mhc: 3, MHC, "builds a int: give a class, a function"),
    "without_a_key": (Sum, MHC, "contraction=Sum replaces the final norm and has no parameter"),
    "beside_another_flag": (Weighted, MHCConfig(), "contraction= with --mhc-contract mean: give .* library"),
    "absent": (None, MHC, "--mhc-contract library, and this model was given no contraction: have your own"),
    "on_a_plain_checkpoint": (
        Replacing,
        MHCConfig(contract="library", load_dense=True),
        "--mhc-load-dense: the contraction replaces the final norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_contraction_is_refused_as_the_model_is_built(run_ranks, case):
    contraction, mhc, words = REFUSED[case]
    error = run_ranks(1, built, contraction, mhc)[0]
    assert isinstance(error, str)
    with pytest.raises(ValueError, match=words):
        raise ValueError(error)


def hybrid_gradients(layout, mhc, contraction):
    hybrid.wrap_hybrid_spec = functools.partial(wrap_hybrid_spec, contraction=contraction)
    import test_hybrid

    loss, chunks = test_hybrid.run(layout, "M*|-E" if layout.pp > 1 else "M*-E", mhc)
    return loss, {name: gpt_gradient.clone() for name, gpt_gradient in gradients(chunks)}


def gradients(chunks):
    return ((name, p.main_grad) for name, p in global_parameters(chunks) if "contraction" in name)


def test_a_hybrid_model_takes_a_contraction_too(run_ranks):
    (loss, found) = run_ranks(1, hybrid_gradients, Layout(), MHC, Weighted)[0]
    both = run_ranks(2, hybrid_gradients, Layout(pp=2), MHC, Weighted)
    assert list(found) == ["decoder.final_norm.contraction.weight"]
    last = {name: value for _, grads in both for name, value in grads.items()}
    assert abs(loss - both[0][0]) <= 1e-10
    for name, value in found.items():
        torch.testing.assert_close(last[name], value, rtol=1e-9, atol=1e-12)
