"""Continue a text with a trained model.

    python -m megatron_mhc.generate --load checkpoints/ --prompt "The streams" --tokens 64

The checkpoint is read as `python -m megatron_mhc.export` reads it, and runs as the model that it exports, by
Hugging Face transformers: on a GPU if there is one, with a KV cache. Without a Hugging Face tokenizer the
prompt is token ids, and token ids are printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.export.folder import load_tokenizer, read


def load_model(load: Path, trust: bool = False) -> tuple[Any, Any]:
    """The exported model of a checkpoint, in memory, and the arguments of the training.

    Raises:
        ValueError: transformers is not installed, or what `read` raises.
    """
    try:
        from megatron_mhc.export.modeling_mhc_gpt import MHCGPTConfig, MHCGPTForCausalLM
    except ImportError as error:
        raise ValueError("generation runs by transformers: `pip install 'transformers>=5'`") from error
    sizes, tensors, args = read(load, trust)
    with torch.device("meta"):
        model = MHCGPTForCausalLM(MHCGPTConfig(**sizes))
    if sizes["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval(), args


def continued(model: Any, words: Any, prompt: str, tokens: int, temperature: float) -> str:
    """The prompt and what the model says behind it.

    Args:
        words: transformers' tokenizer; None where prompt and answer are token ids.
        tokens: how many at most.
        temperature: of sampling; 0 takes the likeliest token each time.

    Raises:
        ValueError: the prompt has no token, or one that the model does not know.
    """
    try:
        ids = [int(word) for word in prompt.split()] if words is None else words.encode(prompt)
    except ValueError as error:
        raise ValueError(
            f"--prompt {prompt!r}: without a tokenizer give token ids, or --tokenizer"
        ) from error
    if not ids or not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise ValueError(
            f"--prompt {prompt!r}: give at least one token, of ids below {model.config.vocab_size}"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    given = torch.tensor([ids], device=model.device)
    ends = {} if words is None else {"eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    said = model.generate(given, attention_mask=given >= 0, max_new_tokens=tokens, **sampling, **ends)[0]
    return " ".join(map(str, said.tolist())) if words is None else words.decode(said)


def main() -> None:
    """Generate by the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, of torch_dist or torch")
    parser.add_argument("--prompt", required=True, help="text, or token ids where there is no tokenizer")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; 0, the default, is greedy"
    )
    parser.add_argument("--tokenizer", help="Hugging Face name or folder; default: that of the training")
    parser.add_argument(
        "--trust", action="store_true", help="let a checkpoint run the code that its pickles name"
    )
    given = parser.parse_args()
    try:
        model, args = load_model(given.load, given.trust)
        words = load_tokenizer(args, given.tokenizer)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        print(continued(model, words, given.prompt, given.tokens, given.temperature))
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
