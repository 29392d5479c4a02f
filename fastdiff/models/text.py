"""The text encoder: what a caption tells a U-Net of it (Nichol et al. 2021, "GLIDE", section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_tensor
from .config import UNetConfig

PAD, START, END = 0, 1, 2  # the tokens that every vocabulary begins with


def empty_captions(batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens that say nothing, START END PAD .., int64 [batch, length]."""
    place = torch.arange(length, device=device)
    # of arithmetic alone, which a CUDA graph can capture
    return torch.where(place < 2, place + START, PAD).expand(batch, length)


def check_tokens(name: str, tokens: Tensor, batch: int, config: UNetConfig) -> None:
    """Raise ValueError or TypeError unless these are `batch` captions' tokens of such a network."""
    assert config.vocabulary is not None
    is_tensor(name, tokens)
    wanted = batch, config.text_length
    if tokens.shape != wanted:
        raise ValueError(
            f"{name} of shape {tuple(tokens.shape)}: must be {wanted}, the tokens of a caption an "
            "image"
        )
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name} of dtype {tokens.dtype}: must be int64 tokens")
    # on an accelerator the check would stall the stream at each call
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = torch.aminmax(tokens)
        if low < 0 or high >= config.vocabulary:
            raise ValueError(
                f"{name} with tokens {low} .. {high}: must be 0 .. {config.vocabulary - 1}"
            )


class TextBlock(nn.Module):
    """Attention of all tokens to all, and a layer of four times the width; each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        qkv = self.qkv(self.ln_1(x)).unflatten(2, (3, self.heads, width // self.heads))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj_out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    """A transformer over a caption's tokens, without a mask: padding is a token like the others.

    So the last token's state, padding or not, can tell of the whole caption, as in GLIDE.

    Args:
        config: of the U-Net: `vocabulary`, `text_length` and `text_layers`; the width is that of
            the time embedding, and heads are as the U-Net's attention has them.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("vocabulary=None: must be given, a text encoder reads its tokens")
        width = config.embedding_channels
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.text_length, width))
        self.blocks = nn.Sequential(
            *(TextBlock(width, config.heads_at(width)) for _ in range(config.text_layers))
        )
        self.final_ln = nn.LayerNorm(width)
        # small, as Radford et al. 2021 have them: the blocks add to it
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """The state of each token, [B, L, width], of int64 tokens [B, L]."""
        x = self.token_embedding(tokens) + self.positional_embedding
        return self.final_ln(self.blocks(x))
