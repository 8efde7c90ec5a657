"""Sizes of networks that run in milliseconds: CLIP's, T5's, the flow's and the autoencoder's."""

from fluxedu.models.config import AutoEncoderConfig
from fluxedu.nano import networks

TINY_T5 = networks.T5.with_(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3)
TINY_CLIP = networks.CLIP.with_(
    hidden_size=20,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,  # fewer than T5's 32: some prompts are cut for CLIP only
)
TINY_FLUX = networks.FLUX.with_(
    vec_in_dim=20, context_in_dim=24, hidden_size=48, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(4, 10, 10)
)
TINY_AE = AutoEncoderConfig(ch=8, ch_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=4)
TINY = (TINY_CLIP, TINY_T5, TINY_FLUX, TINY_AE)
NANO = (networks.CLIP, networks.T5, networks.FLUX, networks.AUTOENCODER)
