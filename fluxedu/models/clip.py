"""CLIP's text encoder: a prompt becomes one vector.

A causal transformer over at most 77 tokens. FLUX takes from it only the pooled vector: the state of
the end-of-text token, which has seen the whole prompt, after the last LayerNorm and without CLIP's
projection. Tensor names are those of the official ``text_encoder`` folder.
Source: arXiv 2103.00020; transformers, models/clip/modeling_clip.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import attention_or_map, merge_heads
from fluxedu.models.attention_map import AttentionMap
from fluxedu.models.config import CLIPTextConfig
from fluxedu.probe import Probed, name_sites


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap GELU: ``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(Probed):
    """Multi-head self-attention; ``causal`` lets a token look only back."""

    def __init__(self, dim: int, num_heads: int, causal: bool = True):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        q, k, v = (  # [B, H, L, d]
            self.probe(name, proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
            for name, proj in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        )
        heads = attention_or_map(
            self,
            "map",
            lambda: AttentionMap(q, k, v, x.shape[1], only_back(x) if self.causal else None),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=self.causal),
        )
        return self.out_proj(merge_heads(self.probe("heads", heads)))


def only_back(x: Tensor) -> Tensor:
    """Minus infinity on the scores of what comes later, 0 elsewhere: ``[1, 1, L, L]`` for ``x [B, L, D]``."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return torch.zeros(later.shape, device=x.device).masked_fill(later, -torch.inf)[None, None]


class CLIPMLP(Probed):
    """Widen, bend, narrow."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.probe("hidden", quick_gelu(self.fc1(x))))


class CLIPLayer(Probed):
    """Pre-norm transformer layer: ``x += attn(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, config: CLIPTextConfig, causal: bool = True):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(dim, config.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CLIPMLP(dim, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.probe("attn_out", self.self_attn(self.probe("norm1", self.layer_norm1(x))))
        x = x + self.probe("mlp_out", self.mlp(self.probe("norm2", self.layer_norm2(x))))
        return self.probe("out", x)


class CLIPEmbeddings(nn.Module):
    """A vector per word piece plus a vector per place."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(places)


class CLIPTextTransformer(Probed):
    """Embeddings, layers, last norm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.probe("embedded", self.embeddings(ids))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextEncoder(Probed):
    """``forward(ids [B, L]) -> (states [B, L, D], pooled [B, D])``; ``CLIPTextEncoder()`` is CLIP-L.

    Raises ValueError for more tokens than there are places, or a prompt without its end-of-text token
    (other codes then silently pool the first token).
    """

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__()
        self.config = config or CLIPTextConfig()
        self.text_model = CLIPTextTransformer(self.config)
        name_sites(self, "clip")

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length, most = ids.shape[1], self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"CLIP has {most} places, but the prompt has {length} tokens; cut it to {most}.")
        ends = ids == self.config.eos_token_id
        if not ends.any(dim=1).all():
            raise ValueError(f"every prompt needs its end-of-text token {self.config.eos_token_id}: CLIP pools there.")
        states = self.probe("states", self.text_model(ids))
        first_end = ends.int().argmax(dim=1)
        pooled = states[torch.arange(len(ids), device=ids.device), first_end]
        return states, self.probe("pooled", pooled)
