"""The mHC operations: `reference` defines them in plain torch; kernels run them, by Triton or CUDA.

reference.py   the definition
boundary.py    post_res and the next `pre` in one node of autograd's graph
autograd.py    the kernels under autograd
link.py        what connections in a row share
compiled.py    the same as ops of torch.library, which torch.compile traces
kernels.py     the back ends, and what each can do
options.py     what the kernels of `pre` take besides tensors
autocast.py    products in their own dtype, whatever torch.autocast says

triton/
    pre.py                pre: coefficients and layer input
    post_res.py           post_res, and the gradient of f
    post_res_project.py   post_res and the next connection's projection in one
    mapping_backward.py   the gradients of the coefficients, per token
    pre_backward.py       the gradients of the streams and of the mapping parameters
    stage_ends.py         post_res in two parts, on two pipeline stages
    replay.py             several connections from their coefficients, for recompute
    expand_contract.py    one hidden state to n streams, and back
    sinkhorn.py           H_res in registers
    common.py             what the launchers share
hopper/
    pre.py                pre, by itself or behind the post_res before it, in CUDA for H100 and H200
    pre_backward.py       all gradients of pre
    norm.py               what they are compiled for where a norm is folded in
    compile.py            NVRTC, launches, how channels are cut

A file imports what stands below it here. Which back end serves a connection, `megatron_mhc.backend` says.
"""
