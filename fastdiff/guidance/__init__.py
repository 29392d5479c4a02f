"""Gradients that guide samplers: what `sampler.sample(gradient=...)` takes."""
