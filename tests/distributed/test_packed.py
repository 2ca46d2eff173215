"""Packed sequences (THD, [t, 1, ...] between the layers): every layout against the sequences one by one."""

import functools

import pytest
import torch
import torch.distributed as dist
from harness import Iteration, Layout, build, differences, get_forward_backward_func, ps
from layout_cases import UNIFORM, selective
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import gpt, ranks
from megatron_mhc.testing.gpt import TokenLocalAttention
from megatron_mhc.testing.packed import attend

ERROR = 1e-10
ROTARY_ERROR = 1e-5  # a sequence begins at another angle, and those are float32
TOKENS = 24
# The lengths of each micro-batch's sequences; a context rank holds two of four pieces of each.
BATCH = ((8, 12, 4), (24,), (4, 4, 16), (12, 12))


class PackedAttention(MegatronModule):
    """Test-only core attention, causal inside each sequence; Megatron's local one takes no packed ones.

    With `token_local`, for context ranks, every token sees itself alone.
    """

    token_local = False

    def __init__(self, config, *_, **__):
        super().__init__(config)
        self.alone = TokenLocalAttention(config)

    def forward(self, query, key, value, *_, packed_seq_params=None, **__):
        if packed_seq_params is None:  # a sequence of a batch of one
            lengths, (query, key, value) = [len(query)], (x.squeeze(1) for x in (query, key, value))
        else:
            assert query.dim() == 3
            bounds = packed_seq_params.cu_seqlens_q
            lengths = (bounds[1:] - bounds[:-1]).tolist()
        if self.token_local:
            return self.alone(query[:, None], key[:, None], value[:, None]).view(len(query), 1, -1)
        return attend(query, key, value, lengths)


def sequences():
    """The words of each micro-batch's sequences, with one word more than it has tokens."""
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.randint(0, gpt.SMALL.vocabulary, (length + 1,), generator=generator) for length in lengths]
        for lengths in BATCH
    ]


def packed(parts):
    """Of this context rank: tokens, positions and labels, [1, t], the mask that sees no other sequence, and
    where the sequences begin and end."""
    rank, size = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
    lengths = [len(words) - 1 for words in parts]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mine = []
    for length in lengths:
        pieces = torch.arange(length).chunk(2 * size)
        mine.append(torch.cat([pieces[rank], pieces[-1 - rank]]) if size > 1 else torch.arange(length))
    rows = [(words[:-1][at], at, words[1:][at]) for words, at in zip(parts, mine, strict=True)]
    joined = (torch.cat(column)[None].cuda() for column in zip(*rows, strict=True))
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    hidden = (number[:, None] != number).logical_or(torch.ones(sum(lengths), sum(lengths)).triu(1).bool())
    bounds, longest = bounds.cuda(), max(lengths)
    params = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    return *joined, hidden[None, None].cuda(), params


def forward_step(thd, iterator, model):
    tokens, positions, labels, mask, params = next(iterator)
    more = dict(attention_mask=None, packed_seq_params=params) if thd else dict(attention_mask=mask)
    output = model(tokens, positions, labels=labels, **more)

    def loss(losses):
        total = losses.sum() / TOKENS
        return total, {"loss": total.detach().clone()}

    return output, loss


def take_packed(token_local=False):
    """Have attention of models whose kind is token-local take packed sequences."""
    gpt.TokenLocalAttention, PackedAttention.token_local = PackedAttention, token_local


def iterate(layout, kind, mhc, apart=False, thd=True, token_local=False, **settings):
    """One iteration; the loss, and the chunks."""
    take_packed(token_local)
    layout.initialize()
    config = layout.config(kind, **settings)
    chunks = build(layout, config, kind, mhc)
    megatron = mhc is None or mhc.pipeline_schedule == "megatron"
    schedule = get_forward_backward_func() if megatron else engine.forward_backward
    return loss_of(chunks, schedule, apart, thd), chunks


def loss_of(chunks, schedule, apart=False, thd=True):
    """The loss of one iteration.

    Args:
        apart: of one sequence a micro-batch.
        thd: packed, else beside each other under a mask.
    """
    if apart:
        batch = [packed([words]) for parts in sequences() for words in parts]
    else:
        own = slice(ps.get_data_parallel_rank(), None, ps.get_data_parallel_world_size())
        batch = [packed(parts) for parts in sequences()[own]]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = schedule(
        forward_step_func=functools.partial(forward_step, thd and not apart),
        data_iterator=[iter(batch) for _ in chunks],
        model=chunks,
        num_microbatches=len(batch),
        seq_length=TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    if apart:  # the schedule divides by the number of micro-batches
        for chunk in chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                buffer.grad_data.mul_(len(batch) / len(BATCH))
    sums = [sum(float(report["loss"]) for report in reports), len(reports)]
    total = torch.tensor(sums, dtype=torch.float64, device="cuda")
    dist.all_reduce(total)
    parts = ps.get_context_parallel_world_size() * (len(batch) / len(BATCH) if apart else 1)
    return (total[0] / total[1]).item() * parts


@functools.cache
def sequences_one_by_one(kind, stock=False):
    mhc = None if stock else MHCConfig()
    return ranks.run_ranks(1, lambda: Iteration.of(*iterate(Layout(), kind, mhc, apart=True)))[0]


def compare(layout, kind, mhc, expected, settings):
    return differences(*iterate(layout, kind, mhc, **settings), expected, torch.float64)


def check(run_ranks, world, layout, kind, mhc, settings, expected, limit=ERROR):
    result = run_ranks(world, compare, layout, kind, mhc, expected, settings)[0]
    error, name = result.worst
    assert result.loss <= limit
    assert error <= limit, name


def schedule(name, **options):
    return MHCConfig(pipeline_schedule=name, **options)


PP2, PP2_VPP2, DENSE, MOE = Layout(pp=2), Layout(pp=2, vpp=2), "token_local", "token_local_moe"
CASES = {
    "tp1": (1, Layout(), DENSE, MHCConfig(), {}),
    "tp2_sp": (2, Layout(tp=2, sp=True), DENSE, MHCConfig(), {}),
    "dp2": (2, Layout(), DENSE, MHCConfig(), {}),
    "ep2": (2, Layout(ep=2), MOE, MHCConfig(), {}),
    "pp2": (2, PP2, DENSE, MHCConfig(), {}),
    "pp2_vpp2": (2, PP2_VPP2, DENSE, MHCConfig(), {}),
    "full_recompute": (1, Layout(), DENSE, MHCConfig(), UNIFORM),
    "attention_recompute": (1, Layout(), DENSE, MHCConfig(), selective("core_attn", "layernorm")),
    "pp2_auto": (2, PP2, DENSE, MHCConfig(recompute_layer_num="auto"), {}),
    "pp2_vpp2_interleaved": (2, PP2_VPP2, DENSE, schedule("interleaved"), {}),
    "pp2_interleaved_split": (2, PP2, DENSE, schedule("interleaved", pp_boundary="split"), {}),
    "pp2_fused": (2, PP2, MOE, schedule("fused"), {}),
    "pp2_vpp2_fused_split_auto": (
        2,
        PP2_VPP2,
        MOE,
        schedule("fused", pp_boundary="split", recompute_layer_num="auto"),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_sequences_match_the_sequences_one_by_one(run_ranks, case):
    world, layout, kind, mhc, settings = CASES[case]
    check(run_ranks, world, layout, kind, mhc, settings, sequences_one_by_one(kind))


def test_stock_packed_sequences_match_the_sequences_one_by_one(run_ranks):
    """The harness itself, on Megatron's own model."""
    check(run_ranks, 2, PP2, DENSE, None, {}, sequences_one_by_one(DENSE, stock=True))


RESET = {
    "tp2": (Layout(tp=2), MHCConfig()),
    "pp2_vpp2": (PP2_VPP2, MHCConfig()),
    "pp2_interleaved": (PP2, schedule("interleaved")),
}


@pytest.mark.parametrize("case", RESET)
def test_reset_attention_masks_match_the_sequences_one_by_one(run_ranks, case):
    """--reset-attention-mask and --reset-position-ids: a mask for each micro-batch."""
    layout, mhc = RESET[case]
    expected = sequences_one_by_one("dense")
    check(run_ranks, 2, layout, "dense", mhc, dict(thd=False), expected, ROTARY_ERROR)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(pp=2, cp=2)], ids=["cp2", "pp2_cp2"])
def test_packed_sequences_over_context_ranks_match_a_single_process(run_ranks, layout):
    """With attention in which every token sees itself alone."""
    alone = dict(token_local=True)
    expected = ranks.run_ranks(1, lambda: Iteration.of(*iterate(Layout(), DENSE, MHCConfig(), **alone)))[0]
    check(run_ranks, layout.pp * layout.cp, layout, DENSE, MHCConfig(), alone, expected)
