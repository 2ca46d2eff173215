"""A GPT with manifold-constrained hyper-connections (mHC, arXiv 2512.24880), for Hugging Face transformers.

Plain torch; equation numbers are the paper's. Shapes: b sequences, s tokens, n streams, C channels.
    streams [b, s, n, C]    h_pre, h_post [b, s, n]    h_res [b, s, n, n]
Coefficients are computed and applied in fp32 (fp64 for fp64 streams), whatever the weights' dtype.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

V4_EPS = 1e-6
# The KV cache's name from transformers 5.24 on, and below; `forward` takes both.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MHCGPTConfig(PreTrainedConfig):
    """Sizes of the model.

    rope: inverse_frequencies, magnitude of cos and sin, softmax_scale beside 1/sqrt(d).
    mla: sizes of multi-latent attention; None for grouped-query attention.
    moe: sizes and router of the experts, and `layers`, whether each layer has them; None without.
    mhc: num_residual_streams, preset, h_res, h_pre, h_post, read, post_magnitude, sinkhorn_iterations,
        contract, norm_eps, and gated_rank under the preset qwen4_exp.
    megatron: arguments of the training, for the way back; the model does not read them.
    """

    model_type = "mhc_gpt"

    vocab_size: int = 128
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 8
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope: dict | None = None
    mla: dict | None = None
    moe: dict | None = None
    mhc: dict | None = None
    megatron: dict | None = None


def is_v4(mhc):
    """Whether the mappings are DeepSeek-V4's, or as HY-V4's those without comb = H_res^T."""
    return mhc["preset"] not in ("paper", "qwen4_exp")


def wide(x):
    """x in the dtype of the coefficients."""
    return x if x.dtype == torch.float64 else x.float()


def sinkhorn(logits, iterations):
    """Eq. (9), M_t = T_r(T_c(M_{t-1})) of M_0 = exp(logits), in the log domain."""
    for _ in range(iterations - 1):
        logits = F.log_softmax(F.log_softmax(logits, dim=-2), dim=-1)
    return F.softmax(F.log_softmax(logits, dim=-2), dim=-1)


def sinkhorn_deepseek_v4(logits, iterations):
    """H_res as the transpose of DeepSeek-V4's comb: softmax of its rows, columns, then both in turn."""
    comb = F.softmax(logits, dim=-1) + V4_EPS
    comb = comb / (comb.sum(dim=-2, keepdim=True) + V4_EPS)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + V4_EPS)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + V4_EPS)
    return comb.mT


def projection(streams, weight, eps):
    """Eqs. (14)-(15) and the 1/r of Eq. (16): the projection of the normalised streams, [b, s, m]."""
    flat = wide(streams.flatten(-2))
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + eps)
    return F.linear(flat, weight.to(flat.dtype)) * inverse_rms


def read(streams, h_pre):
    """Eq. (3), the layer input H_pre x: [b, s, C]."""
    return (h_pre.unsqueeze(-2) @ streams.to(h_pre.dtype)).squeeze(-2).to(streams.dtype)


def write(streams, f, h_post, h_res):
    """Eq. (3), H_res x + H_post^T f of a layer output f: [b, s, C]."""
    mixed = h_res @ streams.to(h_res.dtype)
    return (mixed + h_post.unsqueeze(-1) * f.to(h_post.dtype).unsqueeze(-2)).to(streams.dtype)


def inject(streams, f, h_post):
    """What `write` is where H_res is the identity: x + H_post^T f."""
    added = h_post.unsqueeze(-1) * f.to(h_post.dtype).unsqueeze(-2)
    return (streams.to(h_post.dtype) + added).to(streams.dtype)


class HyperConnection(nn.Module):
    """The mappings of one sub-layer.

    Of the parts pre, post and res that are not fixed: weight [m, n*C] fp32, phi transposed (of plain
    hyper-connections [m, C]), bias [m] ([m*n]), and alpha, one for each part.
    """

    def __init__(self, config):
        super().__init__()
        mhc = self.mhc = config.mhc
        n = mhc["num_residual_streams"]
        self.hc = mhc["h_res"] == "unconstrained"
        dynamic = mhc["h_pre"] == "dynamic", mhc["h_post"] == "dynamic", mhc["h_res"] != "identity"
        self.sizes = [size * on for size, on in zip((n, n, n * n), dynamic, strict=True)]
        size = sum(self.sizes)
        rows, width = (size // n, config.hidden_size) if self.hc else (size, n * config.hidden_size)
        if size:
            self.weight = nn.Parameter(torch.zeros(rows, width, dtype=torch.float32))
            self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32))
            self.alpha = nn.Parameter(torch.zeros(sum(dynamic), dtype=torch.float32))

    def logits(self, streams):
        """Eq. (16), alpha * projection + bias: [b, s, m]; with the tanh of Eq. (5) for plain HC."""
        if not any(self.sizes):
            return wide(streams[..., 0, :0])
        if self.hc:  # each stream is normalised and projected by itself
            x = F.rms_norm(wide(streams), streams.shape[-1:], eps=self.mhc["norm_eps"])
            raw = torch.tanh(torch.einsum("mc,bsnc->bsmn", self.weight.to(x.dtype), x)).flatten(2)
        else:
            raw = projection(streams, self.weight, self.mhc["norm_eps"])
        gates = zip(self.alpha.to(raw.dtype), filter(None, self.sizes), strict=True)
        alpha = torch.cat([gate.expand(size) for gate, size in gates])
        return raw * alpha + self.bias.to(raw.dtype)

    def forward(self, streams):
        """h_pre, h_post and h_res of streams."""
        n, raw = streams.shape[-2], self.logits(streams)
        pre, post, res = raw.split(self.sizes, dim=-1)
        ones = raw.new_ones(*raw.shape[:-1], n)
        if self.hc:
            h_pre, h_post, h_res = pre, post, res.unflatten(-1, (n, n))
        else:  # Eqs. (17)-(19)
            v4 = is_v4(self.mhc)
            h_pre = pre.sigmoid() + (V4_EPS if v4 else 0.0)
            h_post = self.mhc.get("post_magnitude", 2.0) * post.sigmoid()
            h_post = h_post + V4_EPS if self.mhc["preset"] == "hy_v4" else h_post
            if self.sizes[2]:
                project = sinkhorn_deepseek_v4 if v4 else sinkhorn
                h_res = project(res.unflatten(-1, (n, n)), self.mhc["sinkhorn_iterations"])
            else:
                h_res = torch.eye(n, dtype=raw.dtype, device=raw.device).expand(*raw.shape[:-1], n, n)
        return h_pre if self.sizes[0] else ones / n, h_post if self.sizes[1] else ones, h_res


class StreamNorm(nn.Module):
    """RMSNorm of each stream by itself, with the weight 1 + w."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, streams):
        unit = F.rms_norm(wide(streams), streams.shape[-1:], eps=self.eps)
        return unit * (1.0 + self.weight.to(unit.dtype).view(streams.shape[-2:]))


class GatedRead(nn.Module):
    """Qwen4-Exp's read of the streams by gates of low rank, and the weights h_post of the write."""

    def __init__(self, config, writes=True):
        super().__init__()
        n, rank = config.mhc["num_residual_streams"], config.mhc["gated_rank"]
        size = n * config.hidden_size
        self.stream_norm = StreamNorm(size, config.mhc["norm_eps"])
        self.read_down = nn.Linear(size, rank, bias=False)
        self.read_up = nn.Linear(rank, size, bias=False)
        self.inject = nn.Linear(size, n, bias=False) if writes else None

    def forward(self, streams):
        """The layer input [b, s, C], and h_post, or None of what writes nothing."""
        n, normed = streams.shape[-2], self.stream_norm(streams)
        flat = normed.flatten(-2).to(self.read_down.weight.dtype)
        hidden = F.silu(wide(self.read_down(flat)) / n).to(flat.dtype)
        gate = wide(self.read_up(hidden)).sigmoid().view(normed.shape)
        layer_input = (gate * normed).mean(dim=-2).to(streams.dtype)
        return layer_input, None if self.inject is None else 2.0 * (wide(self.inject(flat)) / n).sigmoid()


class Contraction(nn.Module):
    """The streams become one: their mean, sum, learned weighted sum, or what a further layer would read."""

    def __init__(self, config):
        super().__init__()
        self.mhc, n = config.mhc, config.mhc["num_residual_streams"]
        if self.mhc["contract"] == "learned_head":
            self.weight = nn.Parameter(torch.zeros(n, n * config.hidden_size, dtype=torch.float32))
            self.bias = nn.Parameter(torch.zeros(n, dtype=torch.float32))
            self.alpha = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, streams, h_pre):
        """Contract the streams; h_pre: of the last connection."""
        if self.mhc["contract"] == "h_pre":
            return read(streams, h_pre)
        if self.mhc["contract"] != "learned_head":
            return streams.mean(dim=-2) if self.mhc["contract"] == "mean" else streams.sum(dim=-2)
        raw = projection(streams, self.weight, self.mhc["norm_eps"])
        weights = torch.sigmoid(raw * self.alpha.to(raw.dtype) + self.bias.to(raw.dtype))
        return read(streams, weights + (V4_EPS if is_v4(self.mhc) else 0.0))


def rotary(config, positions, dtype):
    """cos and sin of the angles at positions [b, s]: [b, 1, s, channels that are rotated]."""
    magnitude, inverse = config.rope["magnitude"], config.rope["inverse_frequencies"]
    inverse = torch.tensor(inverse, dtype=torch.float32, device=positions.device)
    angles = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(x, cos, sin):
    """Rotate the first channels, as many as cos has, of x: [b, heads, s, d]."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([x * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def attend(q, k, v, mask, scale, cache, layer):
    """Attention of q: [b, heads, s, d] to k, v: [b, groups, keys, d]; returns [b, s, heads * d of v]."""
    if cache is not None:
        k, v = cache.update(k, v, layer)
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # a static cache has room behind
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def norm(size, config, there=True):
    """A norm, or nothing."""
    return nn.RMSNorm(size, eps=config.rms_norm_eps) if there else nn.Identity()


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dim = layer, config.head_dim
        self.scale = config.rope["softmax_scale"] * self.dim**-0.5
        width, query = config.hidden_size, config.num_attention_heads * self.dim
        key = config.num_key_value_heads * self.dim
        self.q_proj = nn.Linear(width, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, width, bias=config.linear_bias)
        self.q_norm, self.k_norm = (norm(self.dim, config, config.qk_norm) for _ in range(2))

    def forward(self, x, rotation, mask, cache):
        parts = (linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in parts)
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        return self.o_proj(attend(q, k, v, mask, self.scale, cache, self.layer))


class LatentAttention(nn.Module):
    """Multi-latent attention; the cache holds its keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        mla = config.mla
        self.layer, self.heads, self.latent = layer, config.num_attention_heads, mla["kv_lora_rank"]
        self.nope, self.rotated = mla["qk_head_dim"], mla["qk_pos_emb_head_dim"]
        self.scale = config.rope["softmax_scale"] * (self.nope + self.rotated) ** -0.5
        width, rank = config.hidden_size, mla["q_lora_rank"]
        self.q_a_proj = nn.Linear(width, rank, bias=False) if rank else nn.Identity()
        self.q_a_layernorm = norm(rank or width, config, config.qk_norm)
        self.q_b_proj = nn.Linear(rank or width, self.heads * (self.nope + self.rotated), bias=False)
        self.kv_a_proj = nn.Linear(width, self.latent + self.rotated, bias=False)
        self.kv_a_layernorm = norm(self.latent, config, config.qk_norm)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + mla["v_head_dim"]), bias=False)
        self.o_proj = nn.Linear(self.heads * mla["v_head_dim"], width, bias=config.linear_bias)

    def forward(self, x, rotation, mask, cache):
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj(x).split([self.latent, self.rotated], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.split([self.nope, kv.shape[-1] - self.nope], dim=-1)
        q, q_rope = q.split([self.nope, self.rotated], dim=-1)
        pairs = (part.unflatten(-1, (-1, 2)) for part in (q_rope, k_rope[:, None]))  # of neighbours
        q_rope, k_rope = (rotate(pair.mT.flatten(-2), *rotation) for pair in pairs)
        q = torch.cat([q, q_rope], dim=-1)
        k = torch.cat([k, k_rope.expand(-1, self.heads, -1, -1)], dim=-1)
        return self.o_proj(attend(q, k, v, mask, self.scale, cache, self.layer))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config, width, bias):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Experts, and a shared one; parameters of all experts are stacked in front."""

    def __init__(self, config):
        super().__init__()
        moe = self.moe = config.moe
        experts, width, inner = moe["num_experts"], config.hidden_size, moe["intermediate_size"]
        self.router = nn.Linear(width, experts, bias=False)
        if moe["expert_bias"]:
            self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.zeros(experts, width, inner))
        self.shared = MLP(config, moe["shared_size"], False) if moe["shared_size"] else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if moe["shared_gate"] else None

    def top(self, scores):
        """The chosen experts of scores [T, experts]: [T, k]; of some groups alone where there are groups."""
        k, groups = self.moe["top_k"], self.moe["group_top_k"]
        if groups:
            grouped = scores.unflatten(-1, (self.moe["num_groups"], -1))
            best = grouped.topk(k // groups, dim=-1)[0].sum(dim=-1).topk(groups, dim=-1)[1]
            left = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
            scores = grouped.masked_fill(left[..., None], float("-inf")).flatten(1)
        return scores.topk(k, dim=-1)[1]

    def route(self, x):
        """Chosen experts and their weights, [T, k], of x: [T, C]."""
        moe = self.moe
        dtype = getattr(torch, moe["router_dtype"]) if moe["router_dtype"] else x.dtype
        logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
        if moe["score_function"] == "softmax":
            scores = logits.float().softmax(dim=-1) if moe["pre_softmax"] else logits
            chosen = self.top(scores)
            weights = scores.gather(1, chosen)
            weights = weights if moe["pre_softmax"] else weights.float().softmax(dim=-1)
        else:
            scores = logits.float()
            scores = scores.sigmoid() if moe["score_function"] == "sigmoid" else F.softplus(scores).sqrt()
            chosen = self.top(scores + self.get_buffer("expert_bias") if moe["expert_bias"] else scores)
            weights = scores.gather(1, chosen)
            if moe["top_k"] > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, (weights * (moe["scaling_factor"] or 1.0)).to(dtype)

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, weights = self.route(flat)
        out = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(flat[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = (F.silu(gate) * up * weights[token, place, None]).to(x.dtype)
            out.index_add_(0, token, F.linear(inner, self.down_proj[expert]))
        if self.shared is not None:
            shared = self.shared(flat)
            out = out + (shared if self.shared_gate is None else shared * self.shared_gate(flat).sigmoid())
        return out.view_as(x)


class Layer(nn.Module):
    """Attention and an MLP, each between reading and writing the streams."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = (Attention if config.mla is None else LatentAttention)(config, layer)
        dense = not (config.moe and config.moe["layers"][layer])
        self.mlp = MLP(config, config.intermediate_size, config.linear_bias) if dense else MoE(config)
        self.gated = config.mhc["preset"] == "qwen4_exp"  # whose read is a norm too
        if not self.gated:
            self.input_layernorm = norm(config.hidden_size, config)
            self.post_attention_layernorm = norm(config.hidden_size, config)
        connection = GatedRead if self.gated else HyperConnection
        self.attn_hc, self.mlp_hc = connection(config), connection(config)

        self.reads_previous = config.mhc.get("read") == "previous"

    def forward(self, streams, previous, rotation, mask, cache):
        """The streams behind the layer, and its last h_pre; previous: that of the layer in front."""
        if self.gated:
            layer_input, h_post = self.attn_hc(streams)
            streams = inject(streams, self.self_attn(layer_input, rotation, mask, cache), h_post)
            layer_input, h_post = self.mlp_hc(streams)
            return inject(streams, self.mlp(layer_input), h_post), previous
        own, h_post, h_res = self.attn_hc(streams)
        h_pre = previous if self.reads_previous else own
        f = self.self_attn(self.input_layernorm(read(streams, h_pre)), rotation, mask, cache)
        streams, previous = write(streams, f, h_post, h_res), own
        own, h_post, h_res = self.mlp_hc(streams)
        h_pre = previous if self.reads_previous else own
        f = self.mlp(self.post_attention_layernorm(read(streams, h_pre)))
        return write(streams, f, h_post, h_res), own


class Decoder(nn.Module):
    """From token ids to the last hidden state."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.mixes = config.mhc["contract"] == "mixer"
        self.hc_head = GatedRead(config, writes=False) if self.mixes else Contraction(config)
        self.norm = nn.Identity() if self.mixes else norm(config.hidden_size, config)

    def forward(self, x, attention_mask, position_ids, cache):
        """x: embeddings [b, s, C]; attention_mask: [b, keys], 0 for padding, or [b, 1, s, keys]."""
        past = 0 if cache is None else cache.get_seq_length()
        keys = torch.arange(past + x.shape[1], device=x.device)
        mask = (keys <= keys[past:, None])[None, None]
        if attention_mask is not None and attention_mask.dim() == 4:  # of a static cache
            mask = attention_mask
        elif attention_mask is not None:  # padding sees itself, so that it stays finite
            mask = mask & attention_mask[:, None, None].bool() | (keys == keys[past:, None])
        rotation = rotary(self.config, keys[None, past:] if position_ids is None else position_ids, x.dtype)
        streams = x.unsqueeze(-2).expand(-1, -1, self.config.mhc["num_residual_streams"], -1)
        h_pre = wide(streams.new_zeros(streams.shape[:-1]))
        h_pre[..., 0] = 1.0  # the first layer that reads by others' weights reads stream 0
        for layer in self.layers:
            streams, h_pre = layer(streams, h_pre, rotation, mask, cache)
        if self.mixes:
            return self.norm(self.hc_head(streams)[0])
        return self.norm(self.hc_head(streams, h_pre))


class MHCGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder and its output layer."""

    config_class = MHCGPTConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # bf16 logits would cost the Sinkhorn projection its row sums.
    _keep_in_fp32_modules_strict = ["attn_hc", "mlp_hc", "hc_head", "expert_bias"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        past_key_values=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.model(x, attention_mask, position_ids, cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:])  # 0 keeps all
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
