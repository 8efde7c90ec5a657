"""CLIP's text encoder: a prompt becomes one vector.

A causal transformer over at most 77 tokens. FLUX uses only its pooled vector: the state of the end-of-text token, which
attends to the whole prompt, after the final LayerNorm and without CLIP's projection. Tensor names are those of the
official ``text_encoder`` folder. Source: arXiv 2103.00020; transformers, models/clip/modeling_clip.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import RequestError
from fluxedu.models.attention import merge_heads, to_heads
from fluxedu.models.config import CLIPTextConfig
from fluxedu.probe import Probed, name_sites


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU: ``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(Probed):
    """Multi-head self-attention; if ``causal``, a token attends only to itself and earlier tokens."""

    def __init__(self, dim: int, num_heads: int, causal: bool = True):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        heads = self.num_heads
        q = self.probe("q", to_heads(self.q_proj(x), heads))  # [B, H, L, d] each head's queries
        k = self.probe("k", to_heads(self.k_proj(x), heads))  # [B, H, L, d] each head's keys
        v = self.probe("v", to_heads(self.v_proj(x), heads))  # [B, H, L, d] each head's values
        if self.is_watched("map"):
            attn_map = AttentionMap(q, k, v, x.shape[1], causal=self.causal)
            attn_map = self.probe("map", attn_map)  # [B, H, L, L] attention map (lazy), one row per query
            out = attn_map @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = self.probe("heads", out)  # [B, H, L, d] the output of each head
        return self.out_proj(merge_heads(out))


class CLIPMLP(Probed):
    """Linear, quick GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.probe("hidden", quick_gelu(self.fc1(x)))  # [B, L, M] inside the MLP, after the quick GELU
        return self.fc2(hidden)


class CLIPLayer(Probed):
    """Pre-norm transformer layer: ``x = x + attn(norm(x)); x = x + mlp(norm(x))``."""

    def __init__(self, config: CLIPTextConfig, causal: bool = True):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(dim, config.num_attention_heads, causal)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CLIPMLP(dim, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        normed = self.probe("norm1", self.layer_norm1(x))  # [B, L, D] layer-normalised: the attention's input
        x = x + self.probe("attn_out", self.self_attn(normed))  # [B, L, D] the attention's contribution
        normed = self.probe("norm2", self.layer_norm2(x))  # [B, L, D] layer-normalised: the MLP's input
        x = x + self.probe("mlp_out", self.mlp(normed))  # [B, L, D] the MLP's contribution
        return self.probe("out", x)  # [B, L, D] the tokens as they leave the layer


class CLIPEmbeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)


class CLIPTextTransformer(Probed):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.probe("embedded", self.embeddings(ids))  # [B, L, D] token plus position embeddings
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextEncoder(Probed):
    """``forward(ids [B, L]) -> (states [B, L, D], pooled [B, D])``; ``CLIPTextEncoder()`` is CLIP-L.

    Raises ValueError for more tokens than positions, or for a prompt without its end-of-text token (other
    implementations then silently pool the first token).
    """

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__()
        self.config = config or CLIPTextConfig()
        self.text_model = CLIPTextTransformer(self.config)
        name_sites(self, "clip")

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length, most = ids.shape[1], self.config.max_position_embeddings
        if length > most:
            raise RequestError(
                f"the prompt must have at most {most} tokens, CLIP's positions, not {length}; truncate it."
            )
        ends = ids == self.config.eos_token_id
        if not ends.any(dim=1).all():
            raise RequestError(
                f"every prompt needs its end-of-text token {self.config.eos_token_id}: CLIP pools there."
            )
        states = self.probe("states", self.text_model(ids))  # [B, L, D] normalised; each has read only earlier tokens
        first_end = ends.int().argmax(dim=1)
        pooled = states[torch.arange(len(ids), device=ids.device), first_end]
        pooled = self.probe("pooled", pooled)  # [B, D] the end-of-text state, which modulation receives
        return states, pooled
