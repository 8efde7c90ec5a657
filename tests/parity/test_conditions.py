"""The conditions of fill and kontext are prepared as diffusers prepares them."""

import torch
from diffusers import FluxFillPipeline, FluxKontextPipeline

from fluxedu.sampling.conditions import fold_mask, masked, reference_ids
from fluxedu.sampling.latents import image_ids


class PipelineStub:
    """The attributes of a pipeline that diffusers' methods use."""

    vae_scale_factor = 8

    class vae:
        class config:
            latent_channels, shift_factor, scaling_factor = 16, 0.0, 1.0

    _pack_latents = staticmethod(FluxFillPipeline._pack_latents)


def test_the_mask_is_folded_as_diffusers_folds_it():
    mask = torch.randint(0, 2, (1, 1, 48, 80), generator=torch.Generator().manual_seed(0)).float()
    masked = torch.zeros(1, 16, 6, 10)  # already latents: diffusers does not encode them again
    folded, _ = FluxFillPipeline.prepare_mask_latents(
        PipelineStub(), mask, masked, 1, 16, 1, 48, 80, torch.float32, torch.device("cpu"), None
    )
    assert fold_mask(mask).shape == (1, 15, 256)
    assert torch.equal(fold_mask(mask), folded)


def test_a_reference_image_has_another_frame_id():
    theirs = FluxKontextPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    theirs[..., 0] = 1
    assert torch.equal(reference_ids(6, 10), theirs)
    assert not torch.equal(reference_ids(6, 10), image_ids(6, 10))


def test_masked_pixels_are_grey():
    image, mask = torch.ones(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    assert masked(image, mask)[..., :8].abs().max() == 0 and masked(image, mask)[..., 8:].min() == 1
