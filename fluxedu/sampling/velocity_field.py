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
    """``velocity(x, t)``: what the transformer predicts for latents ``x [B, C, h, w]`` at the time ``t``.

    All its other inputs stay the same during a run. texts: the B encoded prompts; with classifier-free guidance, B
    encoded negative prompts and then the prompts · pictures: what the model reads besides text · request: of one of the
    images; all have the same settings · times: all times at which the solver will evaluate the velocity.
    """

    site_path = "sample"

    def __init__(self, flux: Flux, texts: Conditioning, pictures: Conditions, request: Request, times: list[float]):
        self.flux, self.texts, self.pictures, self.request = flux, texts, pictures, request
        self.prompts = texts[len(texts.txt) // 2 :] if request.uses_cfg else texts  # without the negative ones
        axes, device = len(flux.config.axes_dim), flux.img_in.weight.device
        self.txt_ids = text_ids(texts.txt.shape[1], axes).to(device)  # [L, 3] all zero
        self.img_ids = pictures.join_ids(image_ids(*request.shape, axes)).to(device)  # [N, 3] (frame, row, column)
        self.guidance = None  # a model without a guidance input reads none
        if flux.config.guidance_embed:
            self.guidance = torch.tensor([request.guidance], dtype=torch.float32, device=device)
        # What the transformer would compute anew in every step is computed ahead: the rotations of all positions, and
        # plan(t, ...), the modulation of all blocks at a time. Other times than ``times`` work too, but are slower.
        self.rope = flux.rope(self.img_ids, self.txt_ids)
        self.plan = PlanAhead(flux, times)

    @evaluation_grad_mode()  # no autograd graph, except in `with fe.gradients():`
    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The velocity ``[B, C, h, w]``."""
        next_evaluation(t)  # instruments count the evaluations of a step
        uses_cfg = self.request.uses_cfg_at(t)
        texts = self.texts if uses_cfg else self.prompts
        img = pack(x)  # [B, N, 64]
        img_input = self.pictures.join(img)  # with the channels or tokens of a picture, in variants that read one
        if uses_cfg:
            img_input = img_input.repeat(2, 1, 1)  # [2 B, N, 64], for the negative prompts and the prompts
        v = checkpointed(self.flux)(
            img_input,
            self.img_ids,
            texts.txt,  # [B, L, D] T5's embeddings
            self.txt_ids,
            torch.full((len(img_input),), t, dtype=torch.float32, device=x.device),
            texts.pooled,  # [B, D] CLIP's vector
            self.guidance,
            rope=self.rope,  # of the ids above, in place of computing it again
            plan=self.plan(t, self.guidance, texts.pooled),
        )
        v = v[:, : img.shape[1]]  # without the tokens of a reference picture
        if uses_cfg:
            negative, prompted = v.chunk(2, dim=0)
            negative = self.probe("negative", negative)  # [B, N, O] velocity for the negative prompt
            prompted = self.probe("prompted", prompted)  # [B, N, O] velocity for the prompt
            v = guide(negative, prompted, self.request.true_cfg_scale)
        v = unpack(v, *self.request.shape)
        v = self.probe("velocity", v)  # [B, C, h, w] the (guided) velocity, per evaluation
        return self._with_changed_x0(x, t, v) if t > 0 and self.is_watched("x0") else v

    def _with_changed_x0(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        """``v``, or where an intervention changes the predicted x0, the velocity that leads there from ``x``."""
        x0 = x - t * v
        probed = self.probe("x0", x0)  # [B, C, h, w] predicted x0, x - t * velocity
        return v if probed is x0 else (x - probed) / t
