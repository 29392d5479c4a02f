"""Triton kernels, one file an op, installed as `fastdiff.kernels`; imported when first launched.

Each file has one kernel, `<op>_kernel`, and `plan(*inputs, *outputs)`, the launch that the record's
arguments ask for. `launch` runs that plan; `python -m fastdiff.aot` compiles it without a GPU.
"""
