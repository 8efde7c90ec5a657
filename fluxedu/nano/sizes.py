"""The sizes of the miniature's networks. Without PyTorch."""

from __future__ import annotations

from fluxedu.models.config import AutoEncoderConfig, CLIPTextConfig, Flux2Config, FluxConfig, T5Config

AUTOENCODER = AutoEncoderConfig(
    ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=8, scale_factor=1.0, shift_factor=0.0
)
TEXT_LENGTH = 32  # T5 tokens per prompt, including padding

T5 = T5Config(vocab_size=192, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4)
CLIP = CLIPTextConfig(
    vocab_size=741,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=TEXT_LENGTH,
    eos_token_id=740,
)
FLUX = FluxConfig(
    in_channels=64,
    out_channels=64,
    vec_in_dim=CLIP.hidden_size,
    context_in_dim=T5.d_model,
    hidden_size=160,
    num_heads=5,
    depth=2,
    depth_single_blocks=6,
    axes_dim=(4, 14, 14),
    guidance_embed=False,
)
#: as large as FLUX: the width of the MLP is chosen so that it has as many parameters
FLUX2 = Flux2Config(
    in_channels=64,
    out_channels=64,
    context_in_dim=T5.d_model,
    hidden_size=160,
    mlp_ratio=3.65,
    num_heads=5,
    depth=2,
    depth_single_blocks=6,
    axes_dim=(8, 8, 8, 8),
    guidance_embed=False,
)
