# %% [markdown]
# # 12b · Embedded guidance
#
# **How can one pass do the work of two?** Classifier-free guidance evaluates the network twice per step. FLUX.1-dev
# does it once: the guidance scale is an input of the network, which has learned to predict the guided velocity.
#
# Afterwards you can say where the scale enters FLUX and how a network learns to use it, and recognise in an image that
# guidance was too strong.
#
# 50 minutes · needs notebook 12

# %%
from collections.abc import Callable
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.models.modulation import timestep_embedding
from fluxedu.nano.scenes import caption, render, sample_scene, to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids

device = course.begin()
base = fe.load("nano-base", device=device)  # as it was trained, without a guidance input
nano = fe.load("nano", device=device)  # with embedded guidance, like FLUX.1-dev
prompt = "a red circle left of a blue square"
course.where(nano, "vec")


# %%
def relative_distance(out, reference) -> float:
    """The distance of a run's final latent from that of a reference run, divided by the length of the latter."""
    return float((out.latents - reference.latents).norm() / reference.latents.norm())


# %% [markdown]
# The guidance scale is a number like the time, and becomes part of `vec`, the vector from which the modulation of every
# block is computed (notebook 05b).
#
# ## Predict

# %%
lowest = fe.predict(
    "A network (the student) learns from one with CFG (the teacher) at scale 4. At which of the student's own scales "
    "is the loss smallest: '1', '2', '4' or '6'?",
    "4",
)  # answer
beyond = fe.predict(
    "At scale 40, which kind of guidance changes the latent's size more: 'CFG' or 'embedded'?", "CFG"
)  # answer

# %% [markdown]
# ## Where the scale enters
#
# The miniature learned to predict in one pass, for any guidance scale from 1 to 6.5, the velocity that CFG computes in
# two. FLUX.1-dev is guidance-distilled too, according to its model card. The scale $s$ is embedded like the time, as
# sines and cosines followed by two linear layers with a SiLU between them, and the result is one term of `vec`:
#
# $$\text{vec} = \mathrm{MLP}_t(\gamma(t)) + \mathrm{MLP}_s(\gamma(s)) + \mathrm{MLP}_y(\text{pooled})$$
#
# Nothing else in the network depends on the scale. We can check that: run with scale 1, but replace this term by that
# of scale 6. (`fe.intervene` replaces the value at a *site*, a named point of the model.)

# %%
with torch.no_grad():
    waves = timestep_embedding(torch.tensor([6.0], device=device)).to(nano.dtype)
    term_of_6 = nano.flux.guidance_in(waves)  # [1, D]
with fe.intervene("vec.guidance", lambda term, ctx: term_of_6.expand_as(term)):
    replaced = nano(prompt, seed=3, steps=8, guidance=1.0, progress=False)
at_scale_6 = nano(prompt, seed=3, steps=8, guidance=6.0, progress=False)
at_scale_1 = nano(prompt, seed=3, steps=8, guidance=1.0, progress=False)
course.compare("scale 1 with the term of scale 6, and scale 6", replaced.latents, at_scale_6.latents, within=1e-3)
print(f"scale 1 with its own term: the latent differs by {relative_distance(at_scale_1, at_scale_6):.0%}")

batch_sizes = []
with fe.intervene("img_in", lambda x, ctx: batch_sizes.append(len(x)) or x):
    nano(prompt, seed=3, steps=1, progress=False)
print("samples that the network processes per step for one image:", batch_sizes[0])

# %% [markdown]
# ### How a network learns to do it in one pass
#
# The trained network becomes a *teacher*, and a copy of it with a guidance input the *student*. In each training step
# one draws an image and its caption $c$, a time, noise and a scale $s$, and the student learns to predict what the
# teacher computes in two passes (Meng et al., arXiv 2210.03142):
#
# $$L = \mathbb{E}_{x_t, c, s} \left\| v_{\text{student}}(x_t, t, c, s) - \big[ v(x_t, t, \varnothing) + s\,
# (v(x_t, t, c) - v(x_t, t, \varnothing)) \big] \right\|^2$$

# %% [markdown]
# Your loss can be evaluated on the trained networks: `nano` is the student, `nano-base` the teacher. Here are 40 scenes
# that neither has seen, each with its own noise and time. The student gets one scale and the teacher's target another:

# %%
rng, g = np.random.default_rng(12), torch.Generator().manual_seed(12)
scenes = [sample_scene(rng, size=(128, 128), held_out=True) for _ in range(40)]
x0 = pack(base.autoencoder.encode(to_tensor(np.stack([render(scene) for scene in scenes])).to(device)))  # [40, 64, 64]
t = torch.rand(40, generator=g).to(device)
x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * torch.randn(x0.shape, generator=g).to(device)
text = base.prompt_encoder([caption(scene, rng)[0] for scene in scenes])
empty = base.prompt_encoder([""] * 40)
img_ids, txt_ids = image_ids(16, 16).to(device), text_ids(text.txt.shape[1]).to(device)


def teacher(x, text):
    return base.flux(x, img_ids, text.txt, txt_ids, t, text.pooled)


def student(x, text, scale):
    return nano.flux(x, img_ids, text.txt, txt_ids, t, text.pooled, torch.full((len(x),), scale, device=device))


if fe.passed("guidance.distil"):
    scales = (1.0, 2.0, 4.0, 6.0)
    with torch.no_grad():
        losses = {
            target: [
                float(distillation_loss(lambda x, text, _: student(x, text, own), teacher, x_t, text, empty, target))
                for own in scales
            ]
            for target in (2.0, 4.0)
        }
    for target, row in losses.items():
        print(f"teacher {target:g}:", "  ".join(f"student {own:g}: {loss:.3f}" for own, loss in zip(scales, row)))
    lowest.against(f"{scales[losses[4.0].index(min(losses[4.0]))]:g}")

# %% [markdown]
# In each row the smallest loss stands where both have the same scale: the student has learned what the number means. It
# is not zero, so `nano` is not exactly `nano-base` with guidance.
#
# ## A fitted factor
#
# CFG-Zero* is a variant of CFG, which the library does not have. Early in a run the negative velocity may be longer or
# shorter than the velocity with the prompt, which adds a part to their difference that has nothing to do with the
# prompt. So CFG-Zero* multiplies the negative velocity by a factor $f$ first, fitted by least squares. (It also sets
# the velocity of the first steps to zero, which we leave out.)
#
# $$f = \arg\min_f \| v_{\text{prompt}} - f\, v_{\text{negative}} \|^2$$

# %% exercise="guidance.fitted"

# %% [markdown]
# Your function can replace the library's `guide` in the running pipeline. For eight seeds of five prompts:

# %%
prompts = (
    prompt,
    "a green star above a yellow triangle",
    "a blue circle",
    "a yellow square right of a red star",
    "a purple triangle below a green circle",
)
if fe.passed("guidance.fitted"):
    pairs = []
    with patch("fluxedu.sampling.velocity_field.guide", lambda n, p, s: pairs.append((n, p)) or fitted(n, p, s)):
        for words in prompts:
            base([words] * 8, seed=list(range(8)), steps=4, guidance=3.0, batch=8, progress=False)
    factors = torch.stack([(n * p).sum((1, 2)) / n.square().sum((1, 2)) for n, p in pairs]).cpu().view(5, 4, 8)
    for step in range(4):
        low, middle, high = factors[:, step].quantile(torch.tensor([0.1, 0.5, 0.9]))
        print(f"step {step + 1}: fitted factor {middle:.2f}, for 80 % of the images from {low:.2f} to {high:.2f}")

# %% [markdown]
# A factor of 1 would change nothing. Here all factors are within a few percent of 1, so CFG-Zero* changes little in
# this model.
#
# ## Break it
#
# Two more mistakes: a scale far beyond those of the training, and both kinds of guidance at once, each at its usual
# scale.

# %%
outs = {
    "CFG, 4": base(prompt, seed=3, steps=8, guidance=4.0, progress=False),
    "CFG, 40": base(prompt, seed=3, steps=8, guidance=40.0, progress=False),
    "embedded, 6": at_scale_6,
    "embedded, 40": nano(prompt, seed=3, steps=8, guidance=40.0, progress=False),
    "both, 6 and 4": nano(prompt, seed=3, steps=8, guidance=6.0, true_cfg_scale=4.0, progress=False),
}
fig, axes = plt.subplots(1, len(outs), figsize=(9, 2.2), layout="constrained")
for ax, (name, out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Seed 3: scale 40 destroys the image with CFG, and changes it little with embedded guidance", fontsize=10)
plt.show()

sizes = {name: float(out.latents.square().mean().sqrt()) for name, out in outs.items()}
for name, size in sizes.items():
    print(f"{name}: the latent's root mean square is {size:.1f}")
growth = {"CFG": sizes["CFG, 40"] / sizes["CFG, 4"], "embedded": sizes["embedded, 40"] / sizes["embedded, 6"]}
beyond.against(max(growth, key=growth.get))

# %% [markdown]
# Nothing in the CFG formula limits the latent. Embedded guidance was trained up to 6.5 and changes less beyond. In this
# example two moderate scales used together have the effect of a high one: CFG is applied to velocities that already
# contain guidance (one seed).
#
# ## In five lines
#
# 1. In FLUX.1-dev the guidance scale is an input: an embedding, one term of `vec`, and one pass per step.
# 2. A student learns it from a teacher with CFG, for all scales of a range at once.
# 3. schnell has no such input (notebook 05).
# 4. The scale of embedded guidance means what the teacher's scale meant, within the range of the training.
# 5. Embedded guidance and CFG together guide twice.
#
# **Questions people ask**: *Is dev's guidance CFG?* (flux issues 63 and 159) No: it is an input of a distilled network,
# with no negative prompt and one pass per step. *Can I have a negative prompt?* Yes, `true_cfg_scale` with
# `negative_prompt`, at two samples per step; keep the embedded scale low then, as the last image shows. *Can I pass
# guidance to schnell?* It has no such input. diffusers' pipeline ignores the value; only a direct call of its
# transformer with `guidance=` raises a TypeError. *Which scale should I use?* The official defaults are 2.5 to 3.5 for
# dev, 30 for fill and canny, and 10 for depth. Scales of different models cannot be compared.
#
# **Read**: distillation of guided diffusion, arXiv 2210.03142 · CFG-Zero*, arXiv 2503.18886 ·
# `black-forest-labs/flux`, `model.py` (`guidance_in`).

# %%
fe.score()
