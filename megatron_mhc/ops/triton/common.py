"""What the Triton launchers share."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return triton.next_power_of_2(value)


def part_rows(M: int, n: int, gram: bool) -> int:
    """Numbers of a token in the parts of a projection: M, then the sum of squares of x or, where a norm is
    folded into `pre`, the products <x_i, x_j> of i <= j, row-major."""
    return M + (n * (n + 1) // 2 if gram else 1)


def mapping_block(M: int) -> int:
    """Columns of a tile that holds M mapping rows and one more; tensor cores want at least 16."""
    return max(16, power_of_two(M + 1))


def split(total: int, parts: int, block: int) -> tuple[int, int]:
    """Cut `total` into at most `parts` pieces of whole blocks; returns (piece size, pieces)."""
    piece = triton.cdiv(triton.cdiv(total, max(1, parts)), block) * block
    return piece, triton.cdiv(total, piece)


@triton.jit
def load_output(f, f_bias, place, c, C, keep):
    """F's output, in fp32, at f + place, channels c; with a bias, the sum is rounded as if it were stored."""
    fv = tl.load(f + place, mask=keep, other=0.0)
    if f_bias is not None:
        bias = tl.load(f_bias + c, mask=c < C, other=0.0)
        fv = tl.where(keep, fv.to(tl.float32) + bias.to(tl.float32), 0.0).to(f.dtype.element_ty)
    return fv.to(tl.float32)


@triton.jit
def add_product(total, a, b, PAIR: tl.constexpr, UPCAST: tl.constexpr):
    """total + a . b in fp32, of b in fp32; with PAIR, b as bf16 high and low halves, 16 bits of mantissa
    against an exact bf16 a."""
    if PAIR:
        high = b.to(tl.bfloat16)
        low = (b - high.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            a = a.to(tl.float32)
            return total + tl.dot(a, high.to(tl.float32)) + tl.dot(a, low.to(tl.float32))
        else:
            return tl.dot(a, low, tl.dot(a, high, total))
    else:
        return tl.dot(a.to(tl.float32), b, total, input_precision="ieee" if UPCAST else "tf32x3")


@triton.jit
def load_norm_weight(weight, c, C, ZERO_CENTERED: tl.constexpr):
    """w of channels c in fp32, see `ReadNorm`."""
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    return w


@triton.jit
def add_gram(grams, xs, N: tl.constexpr):
    """grams, a tuple of [BT], plus <x_i, x_j> of i <= j, row-major, of the tiles xs [BT, BC] in fp32."""
    grown = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i, N):
            grown = grown + (grams[(i * (2 * N - i + 1)) // 2 + j - i] + tl.sum(xs[i] * xs[j], axis=1),)
    return grown


@triton.jit
def await_turn(turn, mine):
    """Wait until `mine` programs have finished their turn; what they stored is visible from here on."""
    while tl.atomic_add(turn, 0, sem="acquire") < mine:
        pass
    tl.debug_barrier()


@triton.jit
def finish_turn(turn):
    """Publish what this program has stored and hand the turn on."""
    tl.debug_barrier()  # the release below then covers the stores of all the program's threads
    tl.atomic_add(turn, 1, sem="release")
