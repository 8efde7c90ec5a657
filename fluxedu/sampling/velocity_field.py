"""The velocity that a solver integrates: the transformer with its inputs, and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.models.flux import Flux, PlanAhead
from fluxedu.probe import Sited, is_watching
from fluxedu.sampling.conditions import Conditions
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import Request
from fluxedu.sampling.solvers import active, guide
from fluxedu.sampling.step_context import next_evaluation


class VelocityField(Sited):
    """``velocity(x, t)``: the velocity ``[1, C, h, w]`` at the latent ``x [1, C, h, w]`` and the time ``t``.

    texts: the encoded prompt; with classifier-free guidance, the encoded negative prompt comes before it · pictures:
    what the model reads besides text · times: all times at which the solver will evaluate the velocity.
    """

    site_path = "sample"

    def __init__(self, flux: Flux, texts: Conditioning, pictures: Conditions, request: Request, times: list[float]):
        self.flux, self.pictures, self.request = flux, pictures, request
        device = flux.img_in.weight.device
        txt_ids = text_ids(texts.txt.shape[1])  # [L, 3] all zero
        img_ids = pictures.join_ids(image_ids(*request.shape))  # [N, 3] (0, row, column)
        self.rope = flux.rope(img_ids.to(device), txt_ids.to(device))
        # text tokens, and the modulation at each time, of the prompt alone and of both prompts
        guidance = torch.tensor([request.guidance], device=device) if flux.config.guidance_embed else None
        prompt = texts.split(1)[-1]
        self.prompt_txt, self.prompt_plans = prompt.txt, PlanAhead(flux, times, guidance, prompt.pooled)
        self.both_txt, self.both_plans = texts.txt, PlanAhead(flux, times, guidance, texts.pooled)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        next_evaluation(t)
        request = self.request
        with torch.no_grad() if is_watching() else torch.inference_mode():  # inference mode has cheaper calls
            img = pack(x)  # [1, N, 64]
            if request.uses_cfg and active(t, request.guidance_interval):
                img_twice = self.pictures.join(torch.cat([img, img]))
                both = self.flux.velocity(img_twice, self.both_txt, self.rope, self.both_plans.at(t))
                negative, prompted = both[:, : img.shape[1]].chunk(2)
                negative = self.probe("negative", negative)  # [B, N, O] velocity for the negative prompt
                prompted = self.probe("prompted", prompted)  # [B, N, O] velocity for the prompt
                v = guide(negative, prompted, request.true_cfg_scale)
            else:
                img_once = self.pictures.join(img)
                v = self.flux.velocity(img_once, self.prompt_txt, self.rope, self.prompt_plans.at(t))
                v = v[:, : img.shape[1]]  # without the tokens of a reference picture
            v = unpack(v, *request.shape)
            v = self.probe("velocity", v)  # [B, C, h, w] the (guided) velocity, per evaluation
            if t > 0 and self.is_watched("x0"):  # at t = 0, x is the image itself
                x0 = x - t * v
                probed = self.probe("x0", x0)  # [B, C, h, w] predicted x0, x - t * velocity
                v = v if probed is x0 else (x - probed) / t  # a changed x0 steers the run towards it
        return v
