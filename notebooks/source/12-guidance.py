# %% [markdown]
# # 12 · Guidance
#
# **What does guidance improve, and at what cost?** Images sampled from a flow follow the prompt less closely than one
# would like. *Guidance* makes them follow it more closely; its strength is called the *guidance scale*, which every
# user of such a model can set. This notebook measures what is gained and what is lost.
#
# Afterwards you can write classifier-free guidance for a network without a guidance input, say what FLUX.1-dev does
# instead and why it needs only one pass per step, and recognise in an image that the guidance scale was too high.
#
# 50 minutes · needs notebook 11

# %%
from collections.abc import Callable
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.models.modulation import timestep_embedding
from fluxedu.nano.scenes import Claim
from fluxedu.plots import hide_axes
from fluxedu.sampling.latents import draw_noise, image_ids, pack, text_ids, unpack
from fluxedu.widgets.guidance import guidance, sweep

device = course.begin()
base = fe.load("nano-base", device=device)  # as it was trained, without a guidance input
pipe = fe.load(device=device)  # with embedded guidance, like FLUX.1-dev
prompt = "a red circle left of a blue square"
course.where(pipe, "vec", "solver")


def relative_distance(out, reference) -> float:
    """The distance of a run's final latent from that of a reference run, divided by the length of the latter."""
    return float((out.latents - reference.latents).norm() / reference.latents.norm())


# %% [markdown]
# There are two kinds of guidance. *Classifier-free guidance* (CFG) is part of the sampler: it evaluates the network
# twice per step, with the prompt and without. *Embedded guidance* is an input of the network: the guidance scale is a
# number like the time, and becomes part of `vec`, the vector from which the modulation of every block is computed
# (notebook 05). This notebook shows CFG on `nano-base`, and embedded guidance on the model that you load: the miniature
# or FLUX.1-dev.
#
# ## Predict

# %%
batch_size = fe.predict("With CFG, how many samples does the network process per step for one image?", 2)  # answer
scale_zero = fe.predict(
    "The image of which prompt does CFG give at scale 0? the prompt / the empty prompt", "the empty prompt"
)  # answer
worst_scale = fe.predict(
    "At which of the CFG scales 1, 3, 6 and 15 do the images follow the prompt least?", 15
)  # answer
diversity = fe.predict(
    "At a higher guidance scale, do the images of several seeds differ more or less? more / less", "less"
)  # answer

# %% [markdown]
# ## Build it
#
# The difference between the velocities with and without the prompt is the effect of the prompt. CFG goes further in
# this direction than the velocity with the prompt does. The velocity without the prompt is called the *negative* one,
# because a *negative prompt*, which says what the image should not show, can be used in place of the empty prompt. With
# guidance scale $s$,
#
# $$v = v_{\text{negative}} + s\, (v_{\text{prompt}} - v_{\text{negative}})$$
#
# For $s$ from 0 to 1 this is a mean of the two; for $s > 1$ it is an *extrapolation*, beyond both of them. Why should that
# help? At time $t$ the velocity determines the *score*, the gradient of the log density of the noisy images (for
# $x_t = (1 - t)\, x_0 + t\, x_1$ with Gaussian $x_1$):
#
# $$\nabla_x \log p_t(x) = -\frac{x + (1 - t)\, v(x, t)}{t}$$
#
# It is affine in $v$, and the weights $1 - s$ and $s$ of the two velocities sum to 1, so the extrapolated velocity has the
# extrapolated score. By Bayes' rule
#
# $$\nabla_x \log p_t(x) + s\, \nabla_x \log \frac{p_t(x \mid \text{prompt})}{p_t(x)} = \nabla_x \log \left( p_t(x)\,
# p_t(\text{prompt} \mid x)^s \right)$$
#
# since $p_t(\text{prompt})$ does not depend on $x$: guidance counts the evidence for the prompt $s$ times. (This holds at
# each time separately, so the final images are not exact samples of the density on the right at $t = 0$.)

# %% exercise="guidance.guide"

# %% exercise="guidance.two"

# %% [markdown]
# This works only if the network knows the empty prompt: in its training, a tenth of the captions was replaced by the
# empty one. Now run `nano-base` by hand, with both of your evaluations in one batch:

# %%
encoded = base.prompt_encoder(["", prompt])  # T5's tokens and CLIP's pooled vector for two prompts
txt_len, txt_dim = encoded.txt.shape[1:]
texts = torch.cat([encoded.txt.flatten(1), encoded.pooled], dim=1)  # [2, txt_len * txt_dim + pooled]
img_ids, txt_ids = image_ids(16, 16).to(device), text_ids(txt_len).to(device)


def network_at(t: float) -> Callable:
    """The network at time `t`, as `network(x, text)`."""

    def network(x: Tensor, text: Tensor) -> Tensor:
        txt, pooled = text[:, : txt_len * txt_dim].unflatten(1, (txt_len, txt_dim)), text[:, txt_len * txt_dim :]
        return base.flux(x, img_ids, txt, txt_ids, torch.full((len(x),), t, device=device), pooled)

    return network


library_run = base(prompt, seed=3, steps=8, guidance=4.0, progress=False)
if fe.passed("guidance.guide", "guidance.two"):
    x = pack(draw_noise(3, 16, 16, 16)).to(device)  # [1, 64, 64]
    times = library_run.trajectory.times.tolist()
    with torch.no_grad():
        for t, t_next in zip(times, times[1:]):
            x = x + (t_next - t) * two(network_at(t), x, texts[:1], texts[1:], 4.0)
    by_hand = unpack(x, 16, 16)
    course.compare("the latents of your run and the library's", by_hand, library_run.latents, within=1e-3)

# %%
batch_sizes = []
with fe.intervene("img_in", lambda x, ctx: batch_sizes.append(len(x)) or x):
    base(prompt, seed=3, steps=1, guidance=4.0, progress=False)
batch_size.against(batch_sizes[0])

scale_0 = base(prompt, seed=3, steps=8, guidance=0, true_cfg_scale=0.0, progress=False)
empty = base("", seed=3, steps=8, guidance=0, progress=False)
scale_zero.against("the empty prompt" if relative_distance(scale_0, empty) < 0.01 else "the prompt")

# %% [markdown]
# Scale 1 gives the velocity with the prompt, scale 0 the one without it, and a negative scale leads away from the
# prompt. (Some papers write the scale as 1 + w, so check the convention before you copy a number.)
#
# ### Embedded guidance
#
# The second miniature learned to predict in one pass, for any guidance scale from 1 to 6, the velocity that CFG
# computes in two. FLUX.1-dev is guidance-distilled too, according to its model card. The scale is embedded like the
# time, as sines and cosines followed by two linear layers, and this embedding is one term of `vec`. Nothing else in the
# network depends on the scale. We can check that: run with scale 1, but replace this term by that of scale 6.
# (`fe.intervene` replaces the value at a *site*, a named point of the model.)

# %%
with torch.no_grad():
    term_of_6 = pipe.flux.guidance_in(timestep_embedding(torch.tensor([6.0], device=device)).to(pipe.dtype))  # [1, D]
with fe.intervene("vec.guidance", lambda term, ctx: term_of_6.expand_as(term)):
    replaced = pipe(prompt, seed=3, steps=8, guidance=1.0, progress=False)
at_scale_6 = pipe(prompt, seed=3, steps=8, guidance=6.0, progress=False)
at_scale_1 = pipe(prompt, seed=3, steps=8, guidance=1.0, progress=False)
course.compare("scale 1 with the term of scale 6, and scale 6", replaced.latents, at_scale_6.latents, within=1e-3)
print(f"scale 1 with its own term: the latent differs by {relative_distance(at_scale_1, at_scale_6):.0%}")

# %% [markdown]
# ## See it
#
# We generate images with both kinds of guidance at four scales, with four seeds each and eight steps. The *judge* is a
# program that finds shapes and colours in an image by geometry. It says which of the prompt's claims hold for an image:
# two colours, two shapes, and which object is on the left.

# %%
claim = Claim((("red", "circle", None), ("blue", "square", None)), ((0, "left of", 1),), None)
settings = {"scales": (1.0, 3.0, 6.0, 15.0), "seeds": range(4), "steps": 8, "progress": False}
cfg, embedded = sweep(base, prompt, claim, **settings), sweep(pipe, prompt, claim, **settings)
runs = {"CFG (nano-base)": cfg, "embedded (nano)": embedded}

fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for (name, run), colour, mark in zip(runs.items(), ("#0072b2", "#d55e00"), "os"):
    axes[0].plot(run.scales, [100 * r for r in run.correct], marker=mark, color=colour, label=name)
    axes[1].plot(run.scales, run.diversity, marker=mark, color=colour, label=name)
    axes[2].plot(run.scales, run.latent_rms, marker=mark, color=colour, label=name)
axes[0].set(title=f"CFG, 15: {cfg.correct[3]:.0%} of the claims hold", ylabel="claims that hold, %", ylim=(0, 105))
axes[1].set(
    title=f"CFG, 1 to 6: {1 - cfg.diversity[2] / cfg.diversity[0]:.0%} less diversity",
    ylabel="spread of positions and sizes",
    ylim=0,
)
axes[2].set(
    title=f"CFG, 15: {cfg.latent_rms[3] / cfg.latent_rms[0]:.1f} times as large",
    ylabel="root mean square of the latent",
    ylim=0,
)
for ax in axes:
    ax.set_xlabel("guidance scale")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()

worst_scale.against(int(cfg.scales[cfg.correct.index(min(cfg.correct))]))
diversity.against("less" if cfg.diversity[2] < cfg.diversity[0] else "more")

# %% [markdown]
# For this prompt and four seeds, guidance costs diversity: up to 6 it falls by more than half. More guidance does not
# always mean a better match with the prompt, though. With 40 prompts and 8 steps, CFG at scale 6 was clearly worse than
# at 3 (18 images right in every respect, against 34), and embedded guidance at 3 clearly better than at 1 (36 against
# 25). Whether embedded guidance gets worse from 3 to 6 (32) cannot be told from 40 images.
#
# At 15 the two kinds differ. With CFG the states leave the range that the network was trained on (the spread grows
# again because the images fall apart). Embedded guidance was trained up to 6, and changes little beyond. Look at the
# images:

# %%
guidance(runs).set(cell=(3, 0))

# %% [markdown]
# ## A limited interval
#
# Guidance is not equally useful at all times. Kynkäänniemi et al. (arXiv 2404.07724) found it harmful at high noise
# levels, hardly needed at low ones, and useful in between. So we switch it off at both ends of the run.

# %% exercise="guidance.within"

# %%
interval = (0.3, 0.9)
all_times, limited = (
    sweep(base, prompt, claim, scales=[15.0], seeds=range(4), steps=8, progress=False, guidance_interval=times_on)
    for times_on in ((0.0, 1.0), interval)
)
print(f"scale 15, between t = {interval[0]} and {interval[1]} only:")
print(f"root mean square of the latent: {limited.latent_rms[0]:.1f}, always on {all_times.latent_rms[0]:.1f}")
print(f"claims that hold: {limited.correct[0]:.0%}, always on {all_times.correct[0]:.0%}")

fig, axes = plt.subplots(2, 4, figsize=(6.4, 3.5), layout="constrained")
for row, run in zip(axes, (all_times, limited)):
    for ax, image in zip(row, run.images[0]):
        hide_axes(ax).imshow(image)
axes[0, 0].set_ylabel("always on")
axes[1, 0].set_ylabel(f"t = {interval[0]} to {interval[1]}")
fig.suptitle(
    f"Scale 15: {all_times.correct[0]:.0%} of the claims hold, {limited.correct[0]:.0%} with the limited interval",
    fontsize=10,
)
plt.show()

# %% [markdown]
# ## Put your code into the trained model
#
# The pipeline calls `active` to find out whether guidance is on at a time, and `guide` to apply it. Use yours instead:

# %%
if fe.passed("guidance.guide", "guidance.within"):
    expected = base(prompt, seed=3, steps=8, guidance=4.0, guidance_interval=interval, progress=False)
    with patch("fluxedu.sampling.velocity_field.guide", guide), patch("fluxedu.sampling.request.active", within):
        mine = base(prompt, seed=3, steps=8, guidance=4.0, guidance_interval=interval, progress=False)
    course.compare("the latents with your functions and the library's", mine.latents, expected.latents, within=1e-3)

# %% [markdown]
# CFG-Zero* is a variant of CFG, which the library does not have. Early in a run the negative velocity may be longer or
# shorter than the velocity with the prompt, which adds a part to their difference that has nothing to do with the
# prompt. So CFG-Zero* multiplies the negative velocity by a fitted factor first. (It also sets the velocity of the first
# steps to zero, which we leave out.) A factor of 1 would change nothing.

# %% exercise="guidance.fitted"

# %%
if fe.passed("guidance.fitted"):
    pairs = []
    with patch("fluxedu.sampling.velocity_field.guide", lambda n, p, s: pairs.append((n, p)) or fitted(n, p, s)):
        base(prompt, seed=3, steps=8, guidance=4.0, progress=False)
    factors = [float((n * p).sum() / n.square().sum()) for n, p in pairs]
    print("fitted factors:", " ".join(f"{factor:.2f}" for factor in factors))

# %% [markdown]
# ## Break it
#
# The results of three mistakes look like those of a bad model: the two velocities are exchanged, the scale is far too
# high, or both kinds of guidance are used at once, each at its usual scale.


# %%
def exchanged(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    return prompted + scale * (negative - prompted)  # the two velocities are exchanged


with patch("fluxedu.sampling.velocity_field.guide", exchanged):
    exchanged_run = base(prompt, seed=3, steps=8, guidance=4.0, progress=False)
outs = {
    "CFG, 4": library_run,
    "exchanged": exchanged_run,
    "CFG, 40": base(prompt, seed=3, steps=8, guidance=40.0, progress=False),
    "embedded, 6": at_scale_6,
    "embedded, 40": pipe(prompt, seed=3, steps=8, guidance=40.0, progress=False),
    "both, 6 and 4": pipe(prompt, seed=3, steps=8, guidance=6.0, true_cfg_scale=4.0, progress=False),
}
fig, axes = plt.subplots(1, len(outs), figsize=(10, 2.1), layout="constrained")
for ax, (name, out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Seed 3: a scale of 40 destroys the image with CFG, less so with embedded guidance", fontsize=10)
plt.show()

largest = {name: float(out.latents.abs().max()) for name, out in outs.items()}
print(f"CFG: the latent's largest value is {largest['CFG, 40'] / largest['CFG, 4']:.1f} times as large at 40 as at 4")
print(f"embedded: it is {largest['embedded, 40'] / largest['embedded, 6']:.1f} times as large at 40 as at 6")

# %% [markdown]
# The likely cause of the burnt look: some values of the latent grow beyond those that the autoencoder was trained on.
# Nothing in the CFG formula limits them; embedded guidance is limited by its training. And two moderate scales used
# together have the effect of a high one.
#
# ## In five lines
#
# 1. CFG: `v_negative + scale * (v_prompt - v_negative)`; scale 1 is no guidance, scale 0 ignores the prompt.
# 2. It needs two samples per step, and a network that was also trained with empty prompts.
# 3. In FLUX.1-dev the scale is an input: an embedding, one term of `vec`, and one pass per step. schnell has none.
# 4. For this prompt, guidance costs diversity. It helps to follow the prompt only up to a point; far beyond, images
#    break.
# 5. Guidance can be limited to a part of the run. Here that helped at scale 15, with four seeds: too few to prove it.
#
# **Questions people ask**: *Is dev's guidance CFG?* (flux issues 63 and 159) No: it is an input of a distilled network,
# with no negative prompt and one pass per step. *Can I have a negative prompt?* Yes, `true_cfg_scale` with
# `negative_prompt`, at two samples per step; keep the embedded scale low then, as the last image shows. *Can I pass
# guidance to schnell?* It has no such input. diffusers' pipeline ignores the value; only a direct call of its
# transformer with `guidance=` raises a TypeError. *Which scale should I use?* The official defaults are 2.5 to 3.5 for
# dev, 30 for fill, 50 for canny and 10 for depth. Scales of different models cannot be compared.
#
# **Read**: Classifier-Free Diffusion Guidance, arXiv 2207.12598 · its distillation, arXiv 2210.03142 · the interval,
# arXiv 2404.07724 · CFG-Zero*, arXiv 2503.18886 · `black-forest-labs/flux`, `model.py` (`guidance_in`) · ours:
# `fluxedu/sampling/solvers.py`.

# %%
fe.score()
