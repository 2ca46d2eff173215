"""Megatron's arguments as the words of a command line, and back."""

from __future__ import annotations

import argparse
import io
import math
from contextlib import redirect_stderr
from typing import Any

from megatron_mhc import command_line
from megatron_mhc.config import MHCConfig, flag

# Of an import's own process; a training has others.
_HERE = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-initialization
    --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --mock-data --micro-batch-size 1 --train-iters 1 --lr 1
    --attention-dropout 0 --hidden-dropout 0
""".split()


def words(given: dict[str, Any], mhc: MHCConfig, dtype: str, vocabulary: int) -> list[list[str]]:
    """The flags of a model, each with its values.

    Args:
        given: Megatron's arguments by name; what equals the default needs no flag.
        dtype: float32, bfloat16 or float16.
        vocabulary: rows of the embedding.

    Raises:
        ValueError: naming an argument that Megatron does not have, or that has no such value.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    out: list[list[str]] = []
    for name, value in given.items():
        if name not in actions:
            raise ValueError(f"megatron.{name}: Megatron has no such argument")
        action = actions[name]
        option = action.option_strings[0]
        if value == action.default and type(value) is type(action.default):
            continue
        if action.nargs == 0:
            if value is not action.const:
                raise ValueError(f"megatron.{name} is {value!r:.80}: {option} has no value")
            out.append([option])
        elif value is None:
            raise ValueError(f"megatron.{name} is null: {option} needs a value")
        else:
            out.append([option, "".join(str(value).split())])
    out.append(["--padded-vocab-size", str(vocabulary)])
    if dtype != "float32":
        out.append(["--bf16" if dtype == "bfloat16" else "--fp16"])
    stored = mhc.arithmetic()
    return out + [[flag(name), str(value)] for name, value in stored.items()]


def parse(flags: list[list[str]], given: dict[str, Any]) -> tuple[Any, Any, MHCConfig]:
    """Megatron's arguments of these flags, its transformer config and the mHC options.

    Raises:
        ValueError: what Megatron or mHC says of them; a value that Megatron changed.
    """
    length = str(given["max_position_embeddings"])
    more = ["--seq-length", length, "--tokenizer-type", "NullTokenizer", "--vocab-size", "1"]
    if given.get("num_experts"):
        more += ["--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"]
    line = [word for part in flags for word in part] + _HERE + more
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args, config, mhc = command_line.parse(line, 1)
    except (Exception, SystemExit) as error:
        why = (said.getvalue() if isinstance(error, SystemExit) else str(error)).strip().splitlines() or [
            type(error).__name__
        ]
        raise ValueError(f"Megatron does not take the model's arguments: {why[-1]}") from error
    for name, value in given.items():
        got = getattr(args, name)
        near = isinstance(value, float) and isinstance(got, float) and math.isclose(got, value, rel_tol=1e-12)
        if got != value and not near:
            raise ValueError(f"megatron.{name} is {value!r:.80}, and Megatron makes {got!r:.80} of it")
    return args, config, mhc
