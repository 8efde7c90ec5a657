"""The velocity that a solver integrates: the transformer with its conditioning, and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.models.flux import Flux, Plan
from fluxedu.probe import Sited, is_watching
from fluxedu.sampling.conditions import Conditions
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import Request
from fluxedu.sampling.solvers import active, guide
from fluxedu.sampling.step_context import count_evaluation

#: evaluation times whose modulation is computed at once: fewer make slower matrix products, more need more memory
TIMES_AT_ONCE = 4


class VelocityField(Sited):
    """``field(x, t)``: the velocity at the state ``x [1, N, C]`` (tokens) and the time ``t``, for one image.

    texts: the prompt's conditioning, with classifier-free guidance the negative prompt's before it · conditions: what
    the model reads besides text · times: every time at which the solver will evaluate the field.
    """

    site_path = "sample"

    def __init__(self, flux: Flux, texts: Conditioning, conditions: Conditions, request: Request, times: list[float]):
        self.flux, self.texts, self.conditions, self.request = flux, texts, conditions, request
        self.prompted = texts.split(1)[-1]
        self.times = list(dict.fromkeys(times))
        self._plans: dict[bool, dict[float, Plan]] = {}  # with both prompts or with one -> time -> plan
        device = flux.img_in.weight.device
        is_streamed = any(block.img_mod.lin.weight.device != device for block in flux.double_blocks)
        is_float64 = flux.img_in.weight.dtype == torch.float64  # its products of 4 and of 5 rows round differently
        self.times_at_once = len(self.times) if is_streamed or is_float64 else TIMES_AT_ONCE
        img_ids = conditions.join_ids(image_ids(*request.shape))
        self.rope = flux.rope(img_ids.to(device), text_ids(texts.txt.shape[1]).to(device))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        count_evaluation(t)
        with torch.no_grad() if is_watching() else torch.inference_mode():  # inference mode has cheaper calls
            if self.request.uses_cfg and active(t, self.request.guidance_interval):
                negative, prompted = self._evaluate(torch.cat([x, x]), t, self.texts).chunk(2)
                negative = self.probe("negative", negative)  # [B, N, O] velocity for the negative prompt
                prompted = self.probe("prompted", prompted)  # [B, N, O] velocity for the prompt
                v = guide(negative, prompted, self.request.true_cfg_scale)
            else:
                v = self._evaluate(x, t, self.prompted)
            if self.is_watched("velocity"):
                latent = unpack(v, *self.request.shape)
                probed = self.probe("velocity", latent)  # [B, C, h, w] the (guided) velocity, once per model evaluation
                v = v if probed is latent else pack(probed)
            if t > 0 and self.is_watched("x0"):  # at t = 0, x is the image
                latent = unpack(x - t * v, *self.request.shape)
                probed = self.probe("x0", latent)  # [B, C, h, w] predicted x0, x - t * velocity; change it to steer
                v = v if probed is latent else (x - pack(probed)) / t
        return v

    def _evaluate(self, x: Tensor, t: float, texts: Conditioning) -> Tensor:
        tokens = self.conditions.join(x)
        return self.flux.velocity(tokens, texts.txt, self.rope, self._plan(t, texts))[:, : x.shape[1]]

    def _plan(self, t: float, texts: Conditioning) -> Plan:
        """The modulation at time ``t``, computed together with that of the next evaluation times."""
        planned = self._plans.get(texts is self.texts, {})
        if t in planned:
            return planned[t]
        times = [t]
        if t in self.times:
            start = min(self.times.index(t), max(len(self.times) - self.times_at_once, 0))
            times = self.times[start : start + self.times_at_once]
        device = self.flux.img_in.weight.device
        guidance = torch.tensor([self.request.guidance], device=device) if self.flux.config.guidance_embed else None
        with torch.no_grad():
            plan = self.flux.plan(torch.tensor(times, device=device)[:, None], guidance, texts.pooled)
        self._plans[texts is self.texts] = dict(zip(times, plan, strict=True))
        return self._plans[texts is self.texts][t]
