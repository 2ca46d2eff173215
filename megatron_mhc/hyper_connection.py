"""The parameters of one mHC connection and the two operations around a sub-layer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc import initial
from megatron_mhc.backend import H100, Backend, choose, triton_obstacle
from megatron_mhc.checkpoint_parts import InParts
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.mapping_parameters import MappingParameters, MappingProjection
from megatron_mhc.norm import FoldedNorm
from megatron_mhc.ops import reference
from megatron_mhc.ops.options import BITS, Form, Options, ReadNorm
from megatron_mhc.parallel import gather_parameters, mark_replicated, streams_dtype

if TYPE_CHECKING:
    from megatron_mhc.ops.autograd import KernelMappings, NextPre

    Mappings = reference.Coefficients | KernelMappings


class HyperConnectionModule(MappingParameters, InParts):
    """One mHC connection around one sub-layer: `forward` reads its input, `post_res` writes its output.

    Parameters (fp32), for n streams of C channels, M = n*n + 2n: `mapping_proj.weight [M, n*C]`, whose rows
    are pre, post, res, and `affine [M+3]`, what becomes of a projection: biases [M], then an alpha of each
    part. A part that the configuration fixes has no rows and no alpha. To a data-parallel wrapper and an
    optimizer `affine` is one parameter; checkpoints have `bias`, `alpha_pre`, `alpha_post`, `alpha_res`.

    Args:
        config: Megatron's transformer config.
        mhc: mHC options.
        sublayer_index: 0-based index in the whole model, 2*layer for attention and 2*layer + 1 for
            the MLP, in a HybridModel the layer's; the home stream is `sublayer_index % n`, of a connection
            whose h_pre the next sub-layer reads with (--mhc-read previous) the next one's.
        reserved_sms: see `Options`.
        norm: in front of the sub-layer, if `forward` computes it.

    Source: arXiv 2512.24880 Eqs. (3), (14)-(19).
    """

    whole = "affine"

    def __init__(
        self,
        config: TransformerConfig,
        mhc: MHCConfig,
        sublayer_index: int,
        reserved_sms: int = 0,
        norm: FoldedNorm | None = None,
    ):
        super().__init__(config, mhc)
        self.sublayer_index, self.norm = sublayer_index, norm
        self.backend = Backend(mhc)
        form = Form(sum(BITS[part] for part in mhc.parts), mhc.post_magnitude, mhc.post_eps)
        iterations, v4 = mhc.sinkhorn_iterations, mhc.has_deepseek_form
        self.options = Options(mhc.norm_eps, iterations, v4, reserved_sms, form)
        _built.add(self)
        width = config.hidden_size
        if mhc.backend in ("hopper", "triton"):  # what no device could serve; the rest when streams come
            choose(mhc, width, streams_dtype(config), "cuda", H100)
        self.make_parameters(config, mhc)
        mark_replicated(self, config)

    def make_parameters(self, config: TransformerConfig, mhc: MHCConfig) -> None:
        """Make what the mappings learn, and say in `dynamic` and `parts` what that is."""
        n, width = mhc.num_residual_streams, config.hidden_size
        self.dynamic = {part: part in mhc.parts for part in ("pre", "post", "res")}
        biases = sum(mhc.parts.values())
        self.parts = {}
        if biases:
            self.parts = {"bias": biases, **{"alpha_" + part: 1 for part in mhc.parts}}
            # Plain HC reads each stream with the same C-wide rows, so n times fewer of them.
            rows = biases // n if mhc.is_hc else biases
            columns = width if mhc.is_hc else n * width
            self.mapping_proj = MappingProjection(rows, columns, self.dtype, self.device)
            values = torch.empty(sum(self.parts.values()), dtype=self.dtype, device=self.device)
            self.affine: nn.Parameter = nn.Parameter(values)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise phi by `--mhc-init`, biases too, and alphas by `--mhc-init-gating-factor`.

        Also without `perform_initialization`: the file of a plain model's weights has none of these.
        """
        with torch.device(self.device):  # the default may be meta (--init-model-with-meta-device)
            # Of who reads with it, which is the next one's under --mhc-read previous.
            biases = initial.biases(self.mhc, self.sublayer_index + self.mhc.reads_previous)
        self.affine.fill_(self.mhc.init_gating_factor)
        self.bias.copy_(biases)
        initial.draw_phi(self.mapping_proj.weight, self.mhc, self.config.init_method_std)

    def coefficients(self, x: Tensor) -> reference.Coefficients:
        """Coefficients of the streams x: [T, n, C], by the reference."""
        mhc, alphas = self.mhc, self.alphas
        if mhc.is_hc:
            return reference.hc_mappings(x, self.mapping_proj(), alphas, self.bias, mhc.norm_eps)
        if any(self.dynamic.values()):
            logits = reference.mapping_logits(x, self.mapping_proj(), alphas, self.bias, mhc.norm_eps)
        else:
            logits = x.new_empty((x.shape[0], 0), dtype=reference.coefficient_dtype(x))
        return reference.mhc_mappings(
            logits,
            mhc.num_residual_streams,
            deepseek_v4=mhc.has_deepseek_form,
            post_magnitude=mhc.post_magnitude,
            post_eps=mhc.post_eps,
            sinkhorn_iterations=mhc.sinkhorn_iterations,
            dynamic_pre=self.dynamic["pre"],
            dynamic_post=self.dynamic["post"],
            dynamic_res=self.dynamic["res"],
        )

    def forward(self, streams: Tensor, h_pre: Tensor | None = None) -> tuple[Tensor, Mappings]:
        """Read the sub-layer's input.

        Args:
            streams: [s, b, n*C].
            h_pre: [s*b, n], to read with, of the sub-layer in front (--mhc-read previous); None for its own.

        Returns:
            layer input [s, b, C] in the streams' dtype, or the norm's output in that of F, and the mappings
            that `post_res` needs, with h_pre, h_post [s*b, n] and h_res [s*b, n, n] made of these streams.
        """
        norm = None if self.norm is None else self.norm.read()
        if not torch.compiler.is_compiling() and hasattr(streams, "mhc_ahead"):
            from megatron_mhc.ops import boundary  # imports triton, which a CPU may lack

            # `next_pre` has called what gathers the parameters.
            of = (*self._learned(streams), *(() if h_pre is None else (h_pre,)))
            if (made := boundary.taken(streams, *of, norm=norm)) is not None:
                return made
        n = self.mhc.num_residual_streams
        kernels = self.backend.kernels(streams, streams.shape[-1] // n)
        if kernels is not None:
            from megatron_mhc.ops import autograd

            layer_input, mappings = autograd.pre(
                streams, *self._learned(streams), self.options, kernels, n, norm, h_pre
            )
            return self._for_f(layer_input), mappings
        return self._by_reference(streams, h_pre, norm)

    def _by_reference(
        self, streams: Tensor, h_pre: Tensor | None, norm: ReadNorm | None
    ) -> tuple[Tensor, reference.Coefficients]:
        s, b, _ = streams.shape
        x = reference.by_token(streams, self.mhc.num_residual_streams)
        coefficients = self.coefficients(x)
        if self.mhc.num_residual_streams == 1 and not self.dynamic["pre"] and norm is None:
            # 1 * x is x; handing on x itself also keeps the order in which autograd sums its gradient.
            return streams, coefficients
        read_with = coefficients.h_pre if h_pre is None else h_pre
        return self._for_f(reference.in_sequence(reference.pre(x, read_with, norm), s, b)), coefficients

    def _learned(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """phi and `affine`, for kernels; without a row where all mappings are fixed."""
        if self.parts:
            return self.mapping_proj(), self.affine
        none = streams.new_empty(0, streams.shape[-1], dtype=torch.float32)
        return none, none.flatten()

    def _for_f(self, layer_input: Tensor) -> Tensor:
        """In the dtype that F takes; without a norm of ours, Megatron's casts."""
        if self.norm is None or not self.config.fp32_residual_connection:
            return layer_input
        return layer_input.to(self.config.params_dtype)

    def post_res(
        self,
        streams: Tensor,
        f: Tensor,
        mappings: Mappings,
        f_bias: Tensor | None = None,
        next_pre: NextPre | None = None,
        one_node: bool = True,
    ) -> Tensor:
        """Mix the streams and write the sub-layer's output f: [s, b, C] into them; returns [s, b, n*C].

        Args:
            mappings: of `forward`. f_bias: [C], which kernels add to f as they read it.
            next_pre: of the next connection, for which kernels then work ahead.
            one_node: the graph may keep what this returns, see `ops.boundary`.
        """
        if isinstance(mappings, reference.Coefficients):
            s, b, width = f.shape
            x = streams.view(s * b, self.mhc.num_residual_streams, width)
            return reference.in_sequence(self.write(x, f.reshape(s * b, width), mappings), s, b)
        from megatron_mhc.ops import autograd, boundary

        # A replayed `saved` must not be held by the graph as well.
        linked = self.mhc.boundary != "apart" and not self.mhc.recompute_coefficients
        next_pre = next_pre if linked else None
        if next_pre is not None and one_node and boundary.can_join(mappings, f, next_pre):
            return boundary.post_res_pre(f, mappings, next_pre, f_bias)
        return autograd.post_res(f, mappings, f_bias, linked, next_pre)

    def write(self, x: Tensor, f: Tensor, coefficients: reference.Coefficients) -> Tensor:
        """`post_res` by the reference, of x: [T, n, C] and f: [T, C]."""
        return reference.post_res(x, f, coefficients.h_post, coefficients.h_res)

    def read_across(self, streams: Tensor, h_pre: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` in a CUDA graph whose edge lies in front of `post_res`.

        Args:
            streams: [s, b, n*C]; h_pre: as in `forward`.

        Returns:
            layer input [s, b, C], and the tensors of which `arrived` makes what `post_res` takes.
        """
        s, b, _ = streams.shape
        x = reference.by_token(streams, self.mhc.num_residual_streams)
        kernels = self.backend.kernels(x, x.shape[-1])
        norm = None if self.norm is None else self.norm.read()
        if kernels is None:
            layer_input, mappings = self.forward(streams, h_pre)
            assert isinstance(mappings, reference.Coefficients)
            crossing = [mappings.h_post.contiguous(), mappings.h_res.contiguous()]
            if self.mhc.reads_previous:
                crossing.append(mappings.h_pre.contiguous())
            return layer_input, (streams, *crossing)
        from megatron_mhc.ops import compiled  # imports triton, which a CPU may lack

        options, of_read = compiled.flat(self.options), compiled.of_read(norm, h_pre)
        layer_input, *tensors, _, on = compiled.pre(
            x, *self._learned(streams), *options, kernels.name, *of_read
        )
        tensors += [] if h_pre is None else [on]
        # `pre` alone gives the streams their gradient.
        return self._for_f(reference.in_sequence(layer_input, s, b)), (streams.detach(), *tensors)

    def arrived(self, streams: Tensor, *tensors: Tensor) -> tuple[Tensor, Mappings]:
        """Streams and mappings for `post_res`, of the tensors of `read_across`."""
        if len(tensors) <= 3:  # of the reference
            h_post, h_res, *handed_on = tensors
            h_pre = handed_on[0] if handed_on else torch.empty_like(h_post)
            return streams, reference.Coefficients(h_pre, h_post, h_res)
        from megatron_mhc.ops.autograd import KernelMappings, Saved

        *tunnels, projection, coefficients = tensors[:4]
        saved = Saved(projection, self._learned(streams)[1].detach())
        x = streams.view(tunnels[0].shape)
        on = tensors[4] if tensors[4:] else None
        return streams, KernelMappings(
            tuple(tunnels), coefficients, saved, self.options.form, streams=x, handed_on=on
        )

    # Edges of its graph are taken, which a compiled one does not have.
    @torch.compiler.disable
    def mix(self, streams: Tensor, mappings: Mappings) -> tuple[Tensor, Tensor]:
        """The parts of `post_res` that need no f: u = H_res x: [s, b, n*C], and h_post: [s*b, n]."""
        if isinstance(mappings, reference.Coefficients):
            x = reference.by_token(streams, mappings.h_pre.shape[1])
            u, h_post = reference.mix(x, mappings.h_res), mappings.h_post
        else:
            from megatron_mhc.ops import autograd

            u, h_post = autograd.mix(mappings)
        return u.view(streams.shape), h_post

    def next_pre(self, streams: Tensor, h_pre: Tensor | None = None) -> NextPre | None:
        """What the preceding `post_res` needs to compute this `pre` ahead; streams: [s, b, n*C].

        h_pre: as in `forward`.

        None if it may not: without `--mhc-boundary fused`, the bits have to be those of separate kernels.
        """
        kernels = self.backend.kernels(streams, streams.shape[-1] // self.mhc.num_residual_streams)
        if kernels is None or (kernels.post_res_pre is None and self.mhc.boundary != "fused"):
            return None
        from megatron_mhc.ops.autograd import NextPre

        if kernels.post_res_pre is not None:  # it reads `affine` too
            gather_parameters(self)
        norm = None if self.norm is None else self.norm.read()
        return NextPre(kernels, *self._learned(streams), self.options, norm, h_pre)

    def handed_on(self, mappings: Mappings) -> Tensor | None:
        """Of the mappings, h_pre: [s*b, n] if the next sub-layer is to read with it, else None."""
        if not self.mhc.reads_previous:
            return None
        return mappings.h_pre if isinstance(mappings, reference.Coefficients) else mappings.handed_on

    @property
    def bias(self) -> Tensor:
        """Of `affine`, [n*n+2n] where no part is fixed."""
        return self.split(self.affine)["bias"]

    @property
    def alphas(self) -> tuple[Any, Any, Any]:
        """Of `affine`: alpha_pre, alpha_post, alpha_res, [1] each; None of a fixed part."""
        parts = self.split(self.affine) if self.parts else {}
        return parts.get("alpha_pre"), parts.get("alpha_post"), parts.get("alpha_res")


_built: WeakSet[HyperConnectionModule] = WeakSet()


def stream_widths() -> set[int]:
    """The widths n*C of the streams of this process's models, where they are not C."""
    sizes = {(m.mhc.num_residual_streams, m.config.hidden_size) for m in _built}
    return {n * width for n, width in sizes if n > 1}


def operations() -> list[str]:
    """Which operations the connections of this process run; a line for each kind of streams."""
    lines: Counter[str] = Counter()
    for module in _built:
        mhc, width, dtype = module.mhc, module.config.hidden_size, streams_dtype(module.config)
        device = next((p.device.type for p in module.parameters()), torch.device(module.device).type)
        shape = f"{mhc.num_residual_streams} streams of {width} channels, {dtype}, {device}"
        shape += "" if module.norm is None else ", with the norm of F"
        runs = _runs(module, width, dtype, device)
        lines[f"connections of {shape}: {flag('backend')} {mhc.backend} runs {runs}"] += 1
    return sorted(f"{count} {line}" for line, count in lines.items())


def _runs(module: HyperConnectionModule, width: int, dtype: torch.dtype, device: str) -> str:
    mhc = module.mhc
    try:
        kernels = module.backend.kernels_of(width, dtype, device)
    except ValueError as error:  # the first forward pass will raise it
        return f"none, {error}"
    if kernels is None:
        if mhc.backend != "auto":
            return "reference"
        obstacle = triton_obstacle(mhc, width, dtype, device) or f"the streams are on {device}"
        return f"reference, since {obstacle}"
    runs = kernels.name
    if kernels.reserves_sms and module.options.reserved_sms:
        runs += f", which leaves {module.options.reserved_sms} SMs to receives that wait"
    if mhc.pp_boundary == "split" and not kernels.takes_dh_post:
        runs += "; triton in the backward of the last MLP of a pipeline stage that sends streams"
    return runs


def check_width(streams: Tensor, expected: int, where: str) -> None:
    """Raise if the last dimension is not `expected`: a pipeline neighbour without mHC, or another n."""
    if streams.shape[-1] != expected:
        raise ValueError(
            f"{where}: hidden states are {streams.shape[-1]} wide, expected {expected}; every pipeline stage "
            f"needs the same {flag('num_residual_streams')} and the hooks of megatron_mhc.register()"
        )
