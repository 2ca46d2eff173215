"""An iteration in any parallel layout, compared with a single process's.

Each rank compares all gradients that it holds, shards and copies alike, with its part of the full ones, and
the experts that its routers choose for its tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_mhc.testing.parameters import global_parameters, gradient, shard

# A gradient counts as at least this part of the model's largest, see `differences`.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclasses.dataclass
class Iteration:
    """The mean loss and, by global name, the full gradients of one iteration, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, loss: float, chunks: list[Any]) -> Iteration:
        """What a world of one holds after its iteration."""
        trained = ((name, p) for name, p in global_parameters(chunks) if p.requires_grad)
        return cls(loss, {name: gradient(p).cpu().clone() for name, p in trained})


@dataclasses.dataclass
class Comparison:
    """Where a layout differs from its reference: |loss error| and each gradient's relative error."""

    loss: float
    gradients: dict[str, float]

    @property
    def worst(self) -> tuple[float, str]:
        return max((error, name) for name, error in self.gradients.items())


def differences(loss: float, chunks: list[Any], expected: Iteration, dtype: torch.dtype) -> Comparison:
    """Compare what all ranks hold after an iteration; the result is the same on each of them.

    A gradient's error is max|g - e| / max|e|, where max|e| counts as at least FLOOR times the model's
    largest gradient: H_res of equal streams has no gradient at all, and an alpha's is a sum over tokens
    that nearly cancels.

    Raises:
        AssertionError: a parameter of the reference that no rank holds.
    """
    if any(chunk.ddp_config.use_distributed_optimizer for chunk in chunks):
        _restore_sharded_gradients(chunks)
    floor = _floor(expected, dtype)
    mine: dict[str, float] = {}
    for name, parameter in global_parameters(chunks):
        if not parameter.requires_grad:
            continue
        wanted = shard(expected.gradients[name], parameter)
        error = _relative(gradient(parameter).cpu(), wanted, expected.gradients[name], floor)
        mine[name] = max(error, mine.get(name, 0.0))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    errors: dict[str, float] = {}
    for part in everyone:
        for name, value in part.items():
            errors[name] = max(value, errors.get(name, 0.0))
    if missing := set(expected.gradients) - set(errors):
        raise AssertionError(f"no rank holds {sorted(missing)}")
    return Comparison(abs(loss - expected.loss), errors)


def one_against_one(found: Iteration, expected: Iteration, dtype: torch.dtype) -> Comparison:
    """Compare two iterations of a world of one, as `differences` does."""
    floor = _floor(expected, dtype)
    errors = {name: _relative(found.gradients[name], g, g, floor) for name, g in expected.gradients.items()}
    return Comparison(abs(found.loss - expected.loss), errors)


def _floor(expected: Iteration, dtype: torch.dtype) -> float:
    return FLOOR[dtype] * max(g.abs().max().item() for g in expected.gradients.values())


def _relative(found: Tensor, wanted: Tensor, full: Tensor, floor: float) -> float:
    error = ((found - wanted).abs().max() / max(full.abs().max().item(), floor)).item()
    return error if error == error else float("inf")  # a NaN must not get lost in max()


def _restore_sharded_gradients(chunks: list[Any]) -> None:
    """All-gather gradients that were reduce-scattered; the rest of each buffer is not valid."""
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                own = shards[group.rank()].clone()
                bucket.grad_data.zero_()
                shards[group.rank()].copy_(own)
                dist.all_reduce(bucket.grad_data, group=group)


@dataclasses.dataclass
class Routing:
    """What routers did, by the layer's number in the whole model, micro-batch after micro-batch.

    scores: each [s, b, experts], of what a router multiplied.
    chosen: the same shape, whether the token goes to that expert.
    """

    scores: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)
    chosen: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)

    @classmethod
    def record(cls, chunks: list[Any]) -> Routing:
        """Note from here on what the routers of these model chunks do."""
        routing = cls()
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    routing._watch(module)
        return routing

    def _watch(self, router: Any) -> None:
        route = router.routing
        scores = self.scores.setdefault(router.layer_number - 1, [])
        chosen = self.chosen.setdefault(router.layer_number - 1, [])

        def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            probabilities, experts = route(logits, *args, **kwargs)
            scores.append(logits.detach().clone())
            chosen.append(experts.detach().clone().view_as(logits))
            return probabilities, experts

        router.routing = watched

    def of_last(self, count: int) -> Routing:
        """On the CPU, what was done with the last `count` micro-batches."""

        def last(layers: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
            return {layer: [part.cpu() for part in parts[-count:]] for layer, parts in layers.items()}

        return Routing(last(self.scores), last(self.chosen))

    def gap(self) -> float:
        """How near a token comes to another expert: the least distance between the lowest score that was
        chosen and the highest that was not, as part of the token's largest score; infinite without MoE."""
        least = float("inf")
        for layer, parts in self.scores.items():
            for scores, chosen in zip(parts, self.chosen[layer], strict=True):
                low = scores.masked_fill(~chosen, float("inf")).amin(-1)
                high = scores.masked_fill(chosen, -float("inf")).amax(-1)
                least = min(least, ((low - high) / scores.abs().amax(-1)).min().item())
        return least


@dataclasses.dataclass
class RoutingComparison:
    """Of all ranks: tokens, one for each layer that routes it, those with another expert than in the
    reference, and the largest error of a score, as part of the micro-batch's largest."""

    tokens: int
    moved: int
    scores: float


def compare_routing(mine: Routing, expected: Routing, sequence_parallel: bool) -> RoutingComparison:
    """Compare what this rank's routers did with its share of what one process's did; the same on all ranks.

    Tokens are those of `gpt.forward_backward`: data-parallel ranks take micro-batches in turn, and a rank
    has all tokens of a micro-batch, or with `sequence_parallel` its part of the sequence.
    """
    rank, size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    found = RoutingComparison(0, 0, 0.0)
    for layer, parts in mine.scores.items():
        count = len(expected.scores[layer]) // size
        for at in range(count):
            scores, chosen = parts[at - count].cpu(), mine.chosen[layer][at - count].cpu()
            length = scores.shape[0]
            first = ps.get_tensor_model_parallel_rank() * length if sequence_parallel else 0
            wanted = expected.scores[layer][rank + size * at]
            error = (scores - wanted[first : first + length]).abs().max() / wanted.abs().max()
            other = chosen != expected.chosen[layer][rank + size * at][first : first + length]
            found.tokens += chosen[..., 0].numel()
            found.moved += int(other.any(-1).sum())
            found.scores = max(found.scores, error.item() if error == error else float("inf"))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    tokens, moved = (sum(getattr(part, name) for part in everyone) for name in ("tokens", "moved"))
    return RoutingComparison(tokens, moved, max(part.scores for part in everyone))
