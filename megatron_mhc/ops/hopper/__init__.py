"""CUDA kernels for H100 and H200, n = 4 and bf16: `pre` and its backward, one read of the inputs each."""
