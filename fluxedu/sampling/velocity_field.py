"""The velocity that a solver integrates: the transformer with its conditioning, and classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.models.flux import Flux, Plan
from fluxedu.probe import Sited, is_watching
from fluxedu.sampling.conditions import Conditions
from fluxedu.sampling.latents import image_ids, probe_latent, text_ids
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import Request
from fluxedu.sampling.solvers import active, guide
from fluxedu.sampling.step_context import count_evaluation

TIMES_AT_ONCE = 8  # evaluation times whose modulation is computed in one matrix product


class VelocityField(Sited):
    """``field(x, t)``: the velocity at the state ``x [1, N, C]`` (image tokens) and the time ``t``, for one image.

    texts: the prompt's conditioning; with classifier-free guidance the negative prompt's comes before it · conditions:
    what the model reads besides text · times: all times at which the solver will evaluate the field.
    """

    site_path = "sample"

    def __init__(self, flux: Flux, texts: Conditioning, conditions: Conditions, request: Request, times: list[float]):
        self.flux, self.conditions, self.request = flux, conditions, request
        self.both, self.prompted = texts, texts.split(1)[-1]  # negative and prompted; prompted alone
        img_ids = conditions.join_ids(image_ids(*request.shape))
        txt_ids = text_ids(texts.txt.shape[1])
        device = flux.img_in.weight.device
        self.rope = flux.rope(img_ids.to(device), txt_ids.to(device))
        self.plans_both = PlannedModulation(flux, self.both.pooled, request.guidance, times)
        self.plans_prompted = PlannedModulation(flux, self.prompted.pooled, request.guidance, times)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        count_evaluation(t)
        shape = self.request.shape
        with torch.no_grad() if is_watching() else torch.inference_mode():  # inference mode has cheaper calls
            if self.request.uses_cfg and active(t, self.request.guidance_interval):
                both = self._evaluate(torch.cat([x, x]), self.both.txt, self.plans_both.at(t))
                negative, prompted = both.chunk(2)
                negative = self.probe("negative", negative)  # [B, N, O] velocity for the negative prompt
                prompted = self.probe("prompted", prompted)  # [B, N, O] velocity for the prompt
                v = guide(negative, prompted, self.request.true_cfg_scale)
            else:
                v = self._evaluate(x, self.prompted.txt, self.plans_prompted.at(t))
            v = probe_latent(self, "velocity", v, shape)  # [B, C, h, w] the (guided) velocity, per evaluation
            if t > 0 and self.is_watched("x0"):  # at t = 0, x is the image itself
                x0 = x - t * v
                probed = probe_latent(self, "x0", x0, shape)  # [B, C, h, w] predicted x0, x - t * velocity
                v = v if probed is x0 else (x - probed) / t  # a changed x0 steers the run towards it
        return v

    def _evaluate(self, x: Tensor, txt: Tensor, plan: Plan) -> Tensor:
        tokens = self.conditions.join(x)  # for some models with extra channels, or extra tokens at the end
        velocity = self.flux.velocity(tokens, txt, self.rope, plan)
        return velocity[:, : x.shape[1]]


class PlannedModulation:
    """The modulation of a run, computed for several evaluation times at once and kept only as long as needed."""

    def __init__(self, flux: Flux, pooled: Tensor, guidance: float, times: list[float]):
        self.flux, self.pooled, self.guidance = flux, pooled, guidance
        self.times = list(dict.fromkeys(times))
        is_streamed = flux.placement is not None and flux.placement.mode != "full"
        self.times_at_once = len(self.times) if is_streamed else TIMES_AT_ONCE  # streamed weights travel only once
        self.plans: dict[float, Plan] = {}

    def at(self, t: float) -> Plan:
        """The plan for time ``t``; a time that was not announced is computed on its own."""
        if t not in self.plans:
            times = [t]
            if t in self.times:
                start = min(self.times.index(t), max(len(self.times) - self.times_at_once, 0))
                times = self.times[start : start + self.times_at_once]
            device = self.flux.img_in.weight.device
            guidance = torch.tensor([self.guidance], device=device) if self.flux.config.guidance_embed else None
            with torch.no_grad():
                plan = self.flux.plan(torch.tensor(times, device=device)[:, None], guidance, self.pooled)
            self.plans = dict(zip(times, plan, strict=True))
        return self.plans[t]
