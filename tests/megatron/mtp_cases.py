"""What `mtp_models` and `test_mtp_native` have in common: sizes, a step, and what is compared of it."""

import torch

S, VOCABULARY = 9, 64
SETTINGS = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    normalization="RMSNorm",
    layernorm_epsilon=1e-6,
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    mtp_loss_scaling_factor=0.7,
    use_cpu_initialization=True,
    persist_layer_norm=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
)


def run(model):
    """One step: the loss, all logits (of each depth, then the decoder's) and every gradient."""
    model.train()
    logits = []
    handle = model.output_layer.register_forward_hook(lambda _, args, out: logits.append(out[0].detach()))
    tokens = torch.randint(0, VOCABULARY, (2, S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    labels = tokens.roll(-1, 1)
    loss = model(tokens, torch.arange(S).expand(2, S), mask, labels=labels, loss_mask=torch.ones(2, S)).mean()
    handle.remove()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients}
