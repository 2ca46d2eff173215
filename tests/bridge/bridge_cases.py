"""What test_bridge.py asks: functions that run on the ranks of bridge_server.py."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mhc import MHCConfig, hooks
from megatron_mhc.bridge import MHCDiagnostics, register, use_mhc
from megatron_mhc.diagnostics.sampler import connections
from megatron_mhc.hyper_connection import HyperConnectionModule

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import bridge_llama  # noqa: E402

SEQUENCE, VOCABULARY = 32, 128
NO_FUSION = (
    "apply_rope_fusion bias_activation_fusion bias_dropout_fusion gradient_accumulation_fusion "
    "masked_softmax_fusion persist_layer_norm"
).split()


def llama(folder: str) -> LlamaForCausalLM:
    """A small Llama 3.2, tied and with its RoPE, in a Hugging Face folder; the same in each call."""
    torch.manual_seed(0)
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        rope_parameters=rope | dict(original_max_position_embeddings=8192),
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    if not Path(folder, "config.json").exists():
        model.save_pretrained(folder)
    return model


EXPERTS = dict(moe_grouped_gemm=False, moe_permute_fusion=False, moe_token_dispatcher_type="alltoall")
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts_per_tok=2,
    max_position_embeddings=SEQUENCE,
    tie_word_embeddings=False,
    initializer_range=0.2,
)


def with_experts(kind: str, folder: str) -> Any:
    """A small model of another architecture, in a folder of Hugging Face's."""
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        sizes = _SIZES | dict(num_experts=4, num_key_value_heads=2, head_dim=8)
        model: Any = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    else:  # MLA, a dense layer and one with shared experts
        heads = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12)
        experts = dict(
            n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1
        )
        sizes = _SIZES | heads | experts | dict(num_key_value_heads=4)
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    model.save_pretrained(folder)
    return model.eval()


def logits_with_experts(kind: str, folder: str, modules: str) -> tuple[torch.Tensor, ...]:
    """Hugging Face's, those of the mHC model with its weights, and those of that model's exported folder."""
    expected = with_experts(kind, folder)(batch()[0]).logits.detach()
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    adapt_model(provider)
    provider.transformer_layer_spec = functools.partial(
        gpt_layer_specs.get_gpt_decoder_block_spec, use_transformer_engine=False
    )
    for name, value in EXPERTS.items():
        setattr(provider, name, value)
    use_mhc(provider)
    provider.finalize()
    model = build(provider)
    assert len(connections(model)) == 4
    found = model(*batch()).detach()
    AutoBridge.from_hf_pretrained(folder).save_megatron_model([model], folder + "/megatron")
    logits = exported(folder + "/megatron", folder + "/out", modules)
    assert_comes_back(Path(folder, "out"), Path(folder))
    return expected, found, logits


def assert_comes_back(out: Path, folder: Path) -> None:
    """What was exported is, imported and exported again, the same model."""
    from megatron_mhc.export import export
    from megatron_mhc.import_hf import import_folder

    import_folder(out, folder / "back")
    export(folder / "back", folder / "again")
    one, other = (json.loads((path / "config.json").read_text()) for path in (out, folder / "again"))
    one.pop("megatron"), other.pop("megatron")  # Bridge's record and Megatron's hold different arguments
    assert one == other
    files = (path / "model.safetensors" for path in (out, folder / "again"))
    assert len({file.read_bytes() for file in files}) == 1


def adapt_model(provider: Any) -> None:
    """Megatron's local layers, in the place of Transformer Engine's."""
    for name in NO_FUSION:
        setattr(provider, name, False)
    provider.transformer_impl, provider.attention_backend = "local", None
    spec = provider.transformer_layer_spec
    if isinstance(spec, functools.partial):
        spec.keywords["plain"] = local_layer_spec
    else:
        provider.transformer_layer_spec = local_layer_spec


def provider_of(folder: str, mhc: dict[str, Any] | None, **fields: Any) -> GPTModelProvider:
    """Bridge's provider of the model in a folder; mhc: None leaves it plain."""
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    adapt_model(provider)
    for name, value in fields.items():
        setattr(provider, name, value)
    if mhc is not None:
        use_mhc(provider, **mhc)
    provider.finalize()
    return provider


def build(provider: GPTModelProvider, **options: Any) -> Any:
    if not parallel_state.is_initialized():
        provider.initialize_model_parallel(seed=0)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, **options)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return tokens, torch.arange(SEQUENCE).expand(2, -1), mask


def logits(folder: str, mhc: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's, and those of Megatron's model with its weights."""
    hugging_face, model = llama(folder), build(provider_of(folder, mhc))
    assert bool(connections(model)) == (mhc is not None)
    return hugging_face(batch()[0]).logits.detach(), model(*batch()).detach()


def random_mappings(folder: str) -> list[float]:
    """The standard deviation of each projection of a model with init=uniform."""
    model = build(provider_of(folder, dict(init="uniform")))
    return [c.mapping_proj.weight.std().item() for c in connections(model)]


def exports(folder: str) -> dict[str, str]:
    """How every way out refuses an mHC model, and whether it left something behind."""
    llama(folder)
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = [build(provider_of(folder, {}))]
    ways = {
        "save_hf_pretrained": lambda: bridge.save_hf_pretrained(model, folder + "/out"),
        "save_hf_weights": lambda: bridge.save_hf_weights(model, folder + "/weights"),
        "export_hf_weights": lambda: list(bridge.export_hf_weights(model)),
        "export_adapter_weights": lambda: list(bridge.export_adapter_weights(model)),
    }
    said = {name: error_of(way) for name, way in ways.items()}
    plain = [build(provider_of(folder, None))]
    assert "model.norm.weight" in dict(bridge.export_hf_weights(plain))  # while the hooks are registered
    return said | {"left": str(os.path.exists(folder + "/out"))}


def error_of(act: Any) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def refusals(folder: str) -> dict[str, str]:
    """What is refused, by its case: at once, or where the model is built."""
    from megatron.bridge.models.t5_provider import T5ModelProvider

    llama(folder)

    def asked(**options: Any) -> Any:
        return lambda: use_mhc(AutoBridge.from_hf_pretrained(folder).to_megatron_provider(), **options)

    twice = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    use_mhc(twice, num_residual_streams=2)
    said = dict(
        t5=error_of(lambda: use_mhc(T5ModelProvider(), num_residual_streams=2)),
        other=error_of(lambda: use_mhc(object())),
        twice=error_of(lambda: use_mhc(twice, num_residual_streams=2)),
        both=error_of(asked(mhc=MHCConfig(), num_residual_streams=2)),
        unknown=error_of(asked(streams=2)),
        schedule=error_of(asked(pipeline_schedule="fused")),
        log_interval=error_of(asked(log_interval=5)),
        diagnostics_option=error_of(lambda: MHCDiagnostics(log_interval=5, num_residual_streams=2)),
        diagnostics_interval=error_of(lambda: MHCDiagnostics()),
    )
    said["decentralized"] = error_of(lambda: provider_of(folder, {}).provide(True, True))
    said["full_te_layer"] = error_of(lambda: build(full_te_layer(folder)))
    said["fsdp"] = error_of(lambda: fsdp(folder))
    hooks.revert_all()
    MegatronMappingRegistry.megatron_to_hf_lookup = another
    said["another_bridge"] = error_of(asked(num_residual_streams=2))
    return said


def another(self: Any, megatron_param_name: str, stage: int) -> None:
    """A symbol of another release."""


another.__module__ = MegatronMappingRegistry.__module__


def full_te_layer(folder: str) -> GPTModelProvider:
    """A provider whose layer is one of Transformer Engine's."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    provider = provider_of(folder, {})
    provider.transformer_layer_spec.keywords["plain"] = ModuleSpec(module=torch.nn.Linear)
    return provider


def fsdp(folder: str) -> None:
    from megatron.bridge.models import model_provider
    from megatron.core.distributed import DistributedDataParallelConfig

    model_provider._ddp_wrap = lambda model, *args, **kwargs: model
    build_wrapped = provider_of(folder, {}).provide_distributed_model
    build_wrapped(DistributedDataParallelConfig(), use_megatron_fsdp=True)


def copies(folder: str) -> list[int]:
    """The number of connections in models of copies of a provider, whose config then has the options."""
    llama(folder)
    provider = provider_of(folder, dict(num_residual_streams=2))
    by_field = type(provider)(**{name: getattr(provider, name) for name in provider.__dataclass_fields__})
    by_field.finalize()
    found = []
    for copied in (provider, copy.deepcopy(provider), by_field):
        model = build(copied)
        assert get_model_config(model).mhc.num_residual_streams == 2
        found.append(len(connections(model)))
    return found


def mtp(folder: str, form: str = "single") -> tuple[float, float, list[str]]:
    """Losses with Bridge's MTP block and with one of Megatron's own specs, and the block's layer classes."""
    llama(folder)
    original = gpt_layer_specs.get_gpt_mtp_block_spec

    def local(config: Any, spec: Any, use_transformer_engine: bool, **options: Any) -> Any:
        return original(config, spec, use_transformer_engine=False, **options)

    gpt_layer_specs.get_gpt_mtp_block_spec = local  # Bridge asks for Transformer Engine's
    fields = dict(mtp_num_layers=1, mtp_loss_scaling_factor=0.5)
    tokens, positions, mask = batch()

    def loss_of(provider: GPTModelProvider) -> tuple[Any, Any]:
        model = build(provider, pre_wrap_hook=lambda chunks: chunks)
        for name, parameter in model.named_parameters():
            if "hyper_connection" not in name and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        model.train()
        loss = model(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        return model, loss.item()

    model, loss = loss_of(provider_of(folder, dict(mtp=form), **fields))
    layers = [type(layer.mtp_model_layer) for layer in model.mtp.layers]
    found = [module for module in model.mtp.modules() if isinstance(module, HyperConnectionModule)]
    assert len(found) == (0 if form == "single" else 2)
    assert all(p.grad is not None for p in model.mtp.parameters())

    stock = provider_of(folder, dict(mtp=form), **fields)
    gpt_layer_specs.get_gpt_mtp_block_spec = lambda config, spec, **options: local(
        config, local_layer_spec(config), **options
    )
    _, expected = loss_of(stock)
    return loss, expected, [layer.__name__ for layer in layers]


def hybrid() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits of a plain HybridModel and of one with mHC and its weights; what the final norm is called."""
    found = []
    for mhc in (False, True):
        provider = HybridModelProvider(
            hybrid_layer_pattern="*-M-",
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            seq_length=SEQUENCE,
            vocab_size=VOCABULARY,
            position_embedding_type="rope",
            init_method_std=0.2,
            attention_backend=AttnBackend.auto,
            bf16=False,
            params_dtype=torch.float32,
            **dict.fromkeys(NO_FUSION, False),
        )
        if mhc:
            use_mhc(provider, num_residual_streams=2)
        provider.finalize()
        if not parallel_state.is_initialized():
            provider.initialize_model_parallel(seed=0)
        model_parallel_cuda_manual_seed(0)
        model = build(provider)
        assert len(connections(model)) == 4 * mhc
        found.append(model(*batch()).detach())
    registry = MegatronMappingRegistry(AutoMapping("decoder.final_norm.weight", "model.norm_f.weight"))
    name = next(name for name, _ in model.named_parameters() if "final_norm" in name)
    return *found, registry.megatron_to_hf_lookup(name).hf_param


def lora(folder: str) -> tuple[list[str], float, str]:
    """What Bridge's adapters leave to train, how far the logits are off, and how their export is refused."""
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora import LoRA

    utils.HAVE_TE = False  # its stand-in has no classes
    expected = llama(folder)(batch()[0]).logits
    provider = provider_of(folder, {})
    adapters = LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4, alpha=8, dropout=0.0)
    provider.register_pre_wrap_hook(lambda chunks: adapters(chunks, training=True))
    model = build(provider)
    off = (model(*batch()) - expected).abs().max().item()
    tokens = batch()[0]
    model.train()(*batch(), labels=tokens.roll(-1, 1)).mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    bridge = AutoBridge.from_hf_pretrained(folder)
    return trained, off, error_of(lambda: list(bridge.export_adapter_weights([model])))


class Watch:
    """What Bridge's loop reports of each step, and the gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.logits: torch.Tensor | None = None
        self.dtypes: dict[str, torch.dtype] = {}

    def on_train_step_end(self, context: Any) -> None:
        self.norms.append(float(context.grad_norm))
        if context.loss_dict:  # on the last stage
            self.losses.append(context.loss_dict["lm loss"].flatten()[0].item())
        if not self.gradients:
            for chunk in context.model:
                self.gradients |= global_gradients(chunk)

    def on_train_end(self, context: Any) -> None:
        if dist.get_world_size() == 1:
            model = get_attr_wrapped_model(context.model[0], "decoder", return_model_obj=True).eval()
            with torch.no_grad():
                self.logits = model(*batch())
            self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}


def global_gradients(chunk: Any) -> dict[str, torch.Tensor]:
    """Gradients by the names that a model of one stage has."""
    model = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
    found = {}
    for name, parameter in model.named_parameters():
        before, layers, rest = name.partition("decoder.layers.")
        if layers:
            local, _, rest = rest.partition(".")
            name = f"{layers}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
        found[name] = parameter.main_grad.clone()
    return found


def train(
    folder: str,
    out: str,
    steps: int = 10,
    mhc: str = "",
    model: dict[str, Any] | None = None,
    diagnostics: dict[str, Any] | None = None,
    sharded: bool = True,
    pretrained: str | None = None,
    bf16: bool = False,
) -> dict[str, Any]:
    """Train by the recipe of examples/bridge_llama.py; what its steps did, and the last model's logits.

    Args:
        mhc: as the recipe takes it. model: fields of the provider. diagnostics: options of the callback.
        sharded: the optimizer is the distributed one; of another, gradients stay whole.
        pretrained: checkpoint.pretrained_checkpoint, in the place of weights that the provider loads.
    """
    llama(folder)
    watch = Watch()

    def on_cpu(config: Any) -> None:
        adapt_model(config.model)
        for name, value in (model or {}).items():
            setattr(config.model, name, value)
        config.mixed_precision = "bf16_mixed" if bf16 else None
        config.optimizer.lr, config.optimizer.min_lr = 1e-3, 1e-4
        config.scheduler.lr_decay_iters = 10
        config.scheduler.use_checkpoint_opt_param_scheduler = False
        config.optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = sharded
        config.dist.distributed_backend = "gloo"
        config.tokenizer.tokenizer_type, config.tokenizer.tokenizer_model = "NullTokenizer", None
        config.tokenizer.vocab_size = VOCABULARY - 1
        config.train.global_batch_size, config.train.micro_batch_size = 8, 2
        config.dataset.num_workers, config.dataset.persistent_workers = 0, False
        config.checkpoint.save_interval = 5
        if pretrained is not None:
            config.model._pre_wrap_hooks.clear()
            config.checkpoint.pretrained_checkpoint = pretrained

    arguments = ["--hf", folder, "--out", out, "--steps", str(steps), "--sequence", str(SEQUENCE)]
    callbacks = [watch] if diagnostics is None else [watch, MHCDiagnostics(**diagnostics)]
    bridge_llama.main(*arguments, "--mhc", mhc, adapt=on_cpu, watch=callbacks)
    return vars(watch)


def loaded(checkpoint: str) -> torch.Tensor:
    """Logits of a model that Bridge makes from a checkpoint's own record of it."""
    register()
    from megatron.bridge.training.model_load_save import load_megatron_model

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    (model,) = load_megatron_model(checkpoint, use_cpu_init=True, skip_temp_dist_context=True)
    return model.eval()(*batch()).detach()


def exported(checkpoint: str, folder: str, modules: str) -> torch.Tensor:
    """Logits of what `python -m megatron_mhc.export` makes of a checkpoint."""
    from megatron_mhc.export import export

    export(Path(checkpoint), Path(folder))
    transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model(batch()[0]).logits.detach()
