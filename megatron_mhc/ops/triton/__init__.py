"""Triton kernels of every operation, for bf16, fp16 and fp32."""
