"""One case of test_te_graphs.py in a process of its own: trains a small GPT of Transformer Engine's layers.

    python tests/gpu/graphed.py '{"kind": "dense", "impl": "local", "modules": [], "mhc": {}, "steps": 20}'
    torchrun --standalone --nproc-per-node 2 tests/gpu/graphed.py '{..., "layout": {"tp": 2}}'

The last line of its output is a JSON object: losses, gradient norms, a checksum of the weights, milliseconds
of a step, and MiB: allocated and reserved at most, in steps that begin with nothing cached.
"""
# ruff: noqa: E402

import contextlib
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, get_shared_capture_stream
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.specs import wrap_block_spec

VOCABULARY, WARMUP = 1024, 3
MOE = dict(
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=512,
    moe_grouped_gemm=True,
    moe_token_dispatcher_type="alltoall",
    moe_shared_expert_intermediate_size=512,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=1e-2,
    moe_layer_freq=[0, 1, 1, 1],
)
MLA = dict(
    kv_lora_rank=128, q_lora_rank=128, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64, rope_type="rope"
)
PADDED = dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)


class Run:
    """A model, its optimizer and its steps, as a case asks."""

    def __init__(self, case):
        self.case = case
        self.sequence, self.batch, self.micro_batches = case.get("shape", [512, 1, 4])
        torch.manual_seed(3)
        tensor_parallel.model_parallel_cuda_manual_seed(
            3, te_rng_tracker=True, use_cudagraphable_rng=True, force_reset_rng=True
        )
        self.config = config = self.make_config()
        if case.get("moe_class"):
            gpt_layer_specs.TransformerLayer = MoETransformerLayer
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        if case["mhc"] is not None:
            spec = wrap_block_spec(spec, MHCConfig(**case["mhc"]), config)
        stage, stages = parallel_state.get_pipeline_model_parallel_rank(), config.pipeline_model_parallel_size
        self.last = stage == stages - 1
        model = GPTModel(
            config,
            spec,
            VOCABULARY,
            self.sequence,
            pre_process=stage == 0,
            post_process=self.last,
            position_embedding_type="rope",
        )
        wake(model)
        full = config.cuda_graph_impl == "full_iteration"
        stream = get_shared_capture_stream() if full else torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        with torch.cuda.stream(stream):
            self.model = DistributedDataParallel(config, ddp, Float16Module(config, model.cuda()))
        torch.cuda.current_stream().wait_stream(stream)
        adam = dict(optimizer="adam", lr=3e-4, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16)
        adam |= dict(use_distributed_optimizer=True, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**adam), [self.model])
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        self.schedule = get_forward_backward_func()
        if full:
            self.schedule = FullCudaGraphWrapper(self.schedule, cuda_graph_warmup_steps=WARMUP)
        self.helper = None
        if config.cuda_graph_impl == "transformer_engine":
            self.helper = TECudaGraphHelper(
                [self.model], config, self.sequence, self.batch, optimizers=[self.optimizer]
            )

    def make_config(self):
        case = self.case
        settings = dict(
            num_layers=4,
            hidden_size=512,
            ffn_hidden_size=1536,
            num_attention_heads=8,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            gradient_accumulation_fusion=False,
            cuda_graph_impl=case["impl"],
            cuda_graph_modules=list(case["modules"]),
            cuda_graph_warmup_steps=WARMUP,
        )
        settings |= MOE if case["kind"] == "moe" else {}
        settings |= MLA if case["kind"] == "mla" else {}
        settings |= PADDED if case.get("padded") else {}
        layout = case.get("layout", {})
        settings |= dict(
            tensor_model_parallel_size=layout.get("tp", 1),
            sequence_parallel=layout.get("tp", 1) > 1,
            pipeline_model_parallel_size=layout.get("pp", 1),
        )
        settings |= case.get("settings", {})
        return (MLATransformerConfig if case["kind"] == "mla" else TransformerConfig)(**settings)

    def batches(self, step):
        generator = torch.Generator().manual_seed(100 + step)
        shape = (self.micro_batches, self.batch, self.sequence + 1)
        # Few common tokens, so that the loss falls and an error shows in it.
        draws = (VOCABULARY * torch.rand(shape, generator=generator) ** 4).long()
        return [{"tokens": tokens.cuda()} for tokens in draws]

    def forward_step(self, batches, model):
        tokens = next(batches)["tokens"]
        positions = torch.arange(self.sequence, device="cuda").expand(self.batch, -1).contiguous()

        def mean(losses):
            loss = losses.float().mean()
            return loss, loss.detach().clone()

        return model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous()), mean

    def passes(self, batches, forward_only=False):
        return self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=self.micro_batches,
            seq_length=self.sequence,
            micro_batch_size=self.batch,
            forward_only=forward_only,
        )

    def step(self, number, batches=None):
        if self.helper is not None and number == WARMUP:
            self.helper.create_cudagraphs()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sampled = Sampler([self.model], self.config) if self.case.get("sample_at") == number else None
        with sampled or contextlib.nullcontext():
            loss = self.mean(self.passes(batches or self.batches(number)))
        if sampled is not None:
            assert all(gain > 0 for gain in sampled.report().statistics["gain_forward"])
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return loss, norm

    def mean(self, losses):
        """Of the micro-batches; a stage that has no loss has 0."""
        return torch.stack(list(losses)).mean() if self.last else torch.zeros((), device="cuda")

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            losses = self.passes(self.batches(-1), forward_only=True)
        self.model.train()
        return self.mean(losses).item()

    def weights(self):
        """A number that changes with any bit of any weight of any rank."""
        total = torch.zeros((), dtype=torch.int64, device="cuda")
        for p in self.model.parameters():
            bits = p.detach().contiguous().view(torch.int16).to(torch.int64).flatten()
            places = torch.arange(bits.numel(), device="cuda") % 9973 + 1
            total += (bits * places).sum()
        dist.all_reduce(total)
        return total.item()

    def held(self):
        """All that training changes: lists of tensors, and the optimizer's groups with their step."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        groups = [group for part in parts for group in part.optimizer.param_groups]
        states = [part.optimizer.state for part in parts for _ in part.optimizer.param_groups]
        return list(self.model.parameters()), groups, states

    def state(self):
        weights, groups, states = self.held()
        return dict(
            weights=[p.data for p in weights],
            groups=[{k: v for k, v in group.items() if k != "params"} for group in groups],
            main=[[p.data for p in group["params"]] for group in groups],
            moments=[[dict(s[p]) for p in g["params"]] for g, s in zip(groups, states, strict=True)],
        )

    @torch.no_grad()
    def load(self, saved):
        weights, groups, states = self.held()
        for p, value in zip(weights, saved["weights"], strict=True):
            p.data.copy_(value)
        for at, (group, state) in enumerate(zip(groups, states, strict=True)):
            group.update(saved["groups"][at])
            for p, value, moments in zip(
                group["params"], saved["main"][at], saved["moments"][at], strict=True
            ):
                p.data.copy_(value)
                state[p] = moments


@torch.no_grad()
def wake(model):
    """Give phi and the gates values that make the mappings depend on the token."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "mapping_proj" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        elif "alpha_" in name:
            parameter.fill_(0.5)


def train(case):
    run, steps = Run(case), case["steps"]
    state = case.get("state")  # a file: load it, and go on from its step
    first = 0
    if state:
        saved = torch.load(state, weights_only=False)
        first = saved["step"]
        run.load(saved)
    losses, norms, evaluations = [], [], []
    for number in range(first, steps):
        # Graphs are made WARMUP steps after the start, also of a run that goes on.
        loss, norm = run.step(number - first, run.batches(number))
        losses.append(loss.item())
        norms.append(float(norm))
        if case.get("evaluate") and number % 5 == 4:
            evaluations.append(run.evaluate())
        if case.get("save_at") == number + 1:
            torch.save(run.state() | dict(step=number + 1), case["save"])
    result = dict(losses=losses, norms=norms, evaluations=evaluations, weights=run.weights())
    batches, times = run.batches(0), []
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # of the steps in front of the graphs
    torch.cuda.reset_peak_memory_stats()
    for _ in range(case.get("timed", 8)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run.step(WARMUP + 1, batches)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    result |= dict(
        milliseconds=statistics.median(times),
        allocated=torch.cuda.max_memory_allocated() / 2**20,
        reserved=torch.cuda.max_memory_reserved() / 2**20,
    )
    if run.helper is not None:
        result["graphed_layers"] = len(run.helper.flattened_callables)
    return result


def main():
    case = json.loads(sys.argv[1])
    alone = dict(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    one = "RANK" not in os.environ
    os.environ.update(alone if one else {})
    rank, ranks, device = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl",
        store=dist.HashStore() if one else None,
        rank=rank,
        world_size=ranks,
        device_id=torch.device("cuda", device),
    )
    layout = case.get("layout", {})
    parallel_state.initialize_model_parallel(layout.get("tp", 1), layout.get("pp", 1))
    batch, micro_batches = case.get("shape", [512, 1, 4])[1:]
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, batch * micro_batches, batch, 1)
    result = train(case)
    dist.barrier()
    if rank == ranks - 1:  # the one that has the loss
        print(json.dumps(result), flush=True)
    os._exit(0)  # captured graphs outlive what NCCL's destructor takes down


if __name__ == "__main__":
    main()
