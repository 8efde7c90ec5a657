"""The velocity that a solver integrates: the transformer with its inputs, and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.models.flux import Flux, PlanAhead
from fluxedu.probe import Sited
from fluxedu.sampling.conditions import Conditions
from fluxedu.sampling.gradients import checkpointed, evaluation_grad_mode
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import Request
from fluxedu.sampling.solvers import guide
from fluxedu.sampling.step_context import next_evaluation


class VelocityField(Sited):
    """``velocity(x, t)``: the velocity of B latents ``x [B, C, h, w]`` at the time ``t``, of the same shape.

    texts: the B encoded prompts; with classifier-free guidance, B encoded negative prompts and then the prompts ·
    pictures: what the model reads besides text · request: of one of the images; all have the same settings · times: all
    times at which the solver will evaluate the velocity.
    """

    site_path = "sample"

    def __init__(self, flux: Flux, texts: Conditioning, pictures: Conditions, request: Request, times: list[float]):
        self.flux, self.pictures, self.request = flux, pictures, request
        # the positions of all tokens, text first
        axes = len(flux.config.axes_dim)
        txt_ids = text_ids(texts.txt.shape[1], axes)  # [L, 3] all zero
        img_ids = pictures.join_ids(image_ids(*request.shape, axes))  # [N, 3] (frame, row, column)
        device = flux.img_in.weight.device
        self.img_ids, self.txt_ids = img_ids.to(device), txt_ids.to(device)
        self.rope = flux.rope(self.img_ids, self.txt_ids)
        self.texts = texts
        self.prompts = texts[len(texts.txt) // 2 :] if request.uses_cfg else texts
        scale = torch.tensor([request.guidance], dtype=torch.float32, device=device)
        self.guidance = scale if flux.config.guidance_embed else None
        self.plan = PlanAhead(flux, times)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        next_evaluation(t)  # so that instruments can tell evaluations apart
        with evaluation_grad_mode():  # no graph, unless gradients are wanted
            uses_cfg = self.request.uses_cfg_at(t)
            texts = self.texts if uses_cfg else self.prompts
            img = pack(x)  # [B, N, 64]
            img_input = self.pictures.join(img)
            if uses_cfg:
                img_input = img_input.repeat(2, 1, 1)  # [2 B, N, 64], for the negative prompts and the prompts
            plan = self.plan(t, self.guidance, texts.pooled)  # the modulation of all blocks
            timesteps = torch.full((len(texts.txt),), t, dtype=torch.float32, device=x.device)
            inputs = (img_input, self.img_ids, texts.txt, self.txt_ids, timesteps, texts.pooled, self.guidance)
            v = checkpointed(self.flux)(*inputs, rope=self.rope, plan=plan)
            v = v[:, : img.shape[1]]  # without the tokens of a reference picture
            if uses_cfg:
                negative, prompted = v.chunk(2, dim=0)
                negative = self.probe("negative", negative)  # [B, N, O] velocity for the negative prompt
                prompted = self.probe("prompted", prompted)  # [B, N, O] velocity for the prompt
                v = guide(negative, prompted, self.request.true_cfg_scale)
            v = unpack(v, *self.request.shape)
            v = self.probe("velocity", v)  # [B, C, h, w] the (guided) velocity, per evaluation
            if t > 0 and self.is_watched("x0"):  # at t = 0, the predicted x0 is x itself
                x0 = x - t * v
                probed = self.probe("x0", x0)  # [B, C, h, w] predicted x0, x - t * velocity
                v = v if probed is x0 else (x - probed) / t  # a changed x0 steers the run towards it
        return v
