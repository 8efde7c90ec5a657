"""What fill and kontext read besides text, against diffusers' own preparation."""

import torch
from diffusers import FluxFillPipeline, FluxKontextPipeline

from fluxedu.sampling.conditions import fold_mask, hidden, reference_ids
from fluxedu.sampling.latents import image_ids


class Shell:
    """The little that diffusers' methods ask of a pipeline."""

    vae_scale_factor = 8

    class vae:
        class config:
            latent_channels, shift_factor, scaling_factor = 16, 0.0, 1.0

    _pack_latents = staticmethod(FluxFillPipeline._pack_latents)


def test_the_mask_is_folded_as_diffusers_folds_it():
    mask = torch.randint(0, 2, (1, 1, 48, 80), generator=torch.Generator().manual_seed(0)).float()
    masked = torch.zeros(1, 16, 6, 10)  # a latent already: diffusers then leaves it alone
    folded, _ = FluxFillPipeline.prepare_mask_latents(
        Shell(), mask, masked, 1, 16, 1, 48, 80, torch.float32, torch.device("cpu"), None
    )
    assert fold_mask(mask).shape == (1, 15, 256)
    assert torch.equal(fold_mask(mask), folded)


def test_a_reference_stands_in_another_frame():
    theirs = FluxKontextPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    theirs[..., 0] = 1
    assert torch.equal(reference_ids(6, 10), theirs)
    assert not torch.equal(reference_ids(6, 10), image_ids(6, 10))


def test_what_is_masked_is_grey():
    picture, mask = torch.ones(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    assert hidden(picture, mask)[..., :8].abs().max() == 0 and hidden(picture, mask)[..., 8:].min() == 1
