"""Triton kernels, one file an op, installed as `fastdiff.kernels`; imported when first launched.

An op's file has its kernels and `plan(*inputs, *outputs)`, the launches that the record's arguments
ask for. `launch` runs that plan; `python -m fastdiff.aot` compiles it without a GPU.
"""
