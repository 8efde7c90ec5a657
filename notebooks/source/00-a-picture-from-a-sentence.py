# %% [markdown]
# # 00 · An image from a sentence
#
# **What happens between a prompt and an image?** Run the next cell, then move the time slider: the image emerges from
# noise in twenty steps. At the end of this notebook you will have written the loop that does this, and produced the
# same image: no pixel value differs by more than 1 (of 255).

# %%
import fluxedu as fe
from fluxedu import course, widgets

device = course.begin()  # a GPU if there is one
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square on a white background"
widgets.trajectory(pipe, prompt, seed=4, steps=20, progress=False)

# %% [markdown]
# Black Forest Labs released FLUX.1 in August 2024, with code and weights but without a paper. In this notebook you run
# the whole pipeline once, then go through its stages one by one and look at the tensor that each stage passes on.
#
# 45 minutes · everything runs on a laptop's CPU · the model is the *miniature* that ships with fluxedu: the same code
# as the 12-billion-parameter FLUX.1 with smaller numbers in its config, trained on images of coloured shapes.
#
# ```
# prompt ─ tokenizers ─┬─ CLIP ── one vector ──────────────┐
#                      └─ T5 ──── one vector per token ─┐  │
# seed ─── noise ─── packed into tokens ──► Flux, once per step ──► unpacked ─ autoencoder ─ image
#                                       time from 1 to 0, guidance
# ```

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from fluxedu.course import evidence

out = pipe(prompt, seed=4, steps=20, progress=False)
out.images[0].resize((256, 256))

# %% [markdown]
# One call runs the whole pipeline. `out` also contains the intermediate results of every step.
#
# Before you go on, predict what you will see. Replace each `...` by your answer and run the cell; the notebook measures
# it later and keeps your score. (Below each exercise, `fe.check` tests your code; the dots are its difficulty. Cells
# that begin with `if fe.passed(...)` wait for it: once it is right, run them and all cells below.) T5 and CLIP are the
# two text encoders. The *transformer* is the network that is evaluated once per step; its output is called the
# *velocity* (section 5). A *token* is one vector of the sequence that the transformer works on. The finished image
# consists of 128 × 128 × 3 = 49,152 numbers.

# %%
latent_size = fe.predict("How many numbers describe the image while FLUX works on it?", 4096)  # answer
shuffle_effect = fe.predict(
    "T5's token vectors are shuffled before the transformer gets them. Does its output change: 'yes' or 'no'?", "no"
)  # answer
larger_effect = fe.predict(
    "What changes the output more: setting T5's vectors to zero ('text') or exchanging row and "
    "column in the position of every image token ('rows')?",
    "text",
)  # answer

# %%
latent_size.against(out.latents.numel())
print("latent:", tuple(out.latents.shape), "=", out.latents.numel(), "numbers")
print("the image has", np.asarray(out.images[0]).size // out.latents.numel(), "times as many numbers")

# %% [markdown]
# ## 1 · From words to token ids
#
# A tokenizer splits text into pieces and replaces each piece by a number, its token id. FLUX uses two tokenizers, one
# for each of its two text encoders, T5 and CLIP. T5's pieces begin with `▁` where a word begins; CLIP's end with `</w>`
# where a word ends. The miniature's vocabulary is small, so nearly every word is one piece. Both lists of ids are
# filled up to a fixed length with *padding* tokens, because all prompts of a batch need the same length. FLUX does not
# mask the padding: it treats padding tokens like any other text token.

# %%
encoder = pipe.prompt_encoder
print("T5  :", *encoder.t5_tokenizer.pieces(prompt))
print("CLIP:", *encoder.clip_tokenizer.pieces(prompt))
t5_ids, clip_ids = encoder.t5_tokenizer([prompt]).to(device), encoder.clip_tokenizer([prompt]).to(device)
print("ids :", tuple(t5_ids.shape), "for T5,", tuple(clip_ids.shape), "for CLIP")

# %% [markdown]
# ## 2 · From token ids to vectors
#
# The two text encoders turn the ids into vectors. CLIP produces **one** vector for the whole prompt, the *pooled
# vector*. It helps to set the scale and the offset of the values inside every *block* (a group of layers) of the
# transformer, which is called *modulation* (notebook 05b). T5 produces one vector **per token**. These vectors join the
# image's tokens in the transformer's attention. FLUX.1 gets the same two inputs from CLIP-L (768 numbers) and T5-XXL
# (4,096 numbers per token).

# %%
with torch.no_grad():
    txt = encoder.t5(t5_ids)  # [1, L, D]
    pooled = encoder.clip(clip_ids)[1]  # [1, D']
print("T5  :", tuple(txt.shape), " one row per token")
print("CLIP:", tuple(pooled.shape), "   one row per prompt")

pieces = encoder.t5_tokenizer.pieces(prompt)
vectors = txt[0, : len(pieces)]  # without the padding
similarity = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)  # [pieces, pieces]
fig, ax = plt.subplots(figsize=(6, 4.8), layout="constrained")
heatmap = ax.imshow(similarity.float().cpu(), cmap="cividis", vmin=-0.2, vmax=1)
ax.set_xticks(range(len(pieces)), pieces, rotation=90)
ax.set_yticks(range(len(pieces)), pieces)
of_pair = lambda a, b: float(similarity[pieces.index(a), pieces.index(b)])
ax.set_title(
    f"T5's vectors of red and circle are similar ({of_pair('▁red', '▁circle'):.2f}),\n"
    f"those of red and square are not ({of_pair('▁red', '▁square'):.2f})"
)
_ = fig.colorbar(heatmap, label="cosine similarity", shrink=0.8)

# %% [markdown]
# Find two pairs next to the diagonal: *red* and *circle* have similar vectors, and so have *blue* and *square*; *red*
# and *square* do not. The word *a* occurs three times, with three different vectors, because T5 processes the whole
# sentence before FLUX receives any of its tokens. This is necessary: FLUX gives every text token the same position, so
# it learns about the order of the words only from the vectors of T5 and CLIP.

# %% [markdown]
# ## 3 · From noise to image tokens
#
# The image starts as noise in the autoencoder's *latent space*: 16 channels on a grid of cells, where each cell
# represents 8 × 8 pixels. A *patch* of 2 × 2 cells is packed into one image token, so a 128 × 128 image is 8 × 8 = 64
# tokens of 64 numbers.

# %%
from fluxedu.sampling.latents import draw_noise, image_ids, pack, text_ids, unpack

height, width = out.latents.shape[-2:]  # in latent cells
noise = draw_noise(seed=4, channels=16, height=height, width=width).to(device, pipe.dtype)  # [1, 16, 16, 16]
x = pack(noise)  # [1, 64, 64]
img_ids, txt_ids = image_ids(height, width).to(device), text_ids(txt.shape[1]).to(device)
print("noise :", tuple(noise.shape))
print("tokens:", tuple(x.shape))
changed = int((unpack(x, height, width) != noise).sum())
print("numbers that packing and unpacking have changed:", changed)
print("position ids of the first image tokens (frame, row, column):", img_ids[:3].int().tolist())
print("position ids of all text tokens:", txt_ids.unique(dim=0).int().tolist())

# %% [markdown]
# ## 4 · The schedule
#
# The time t runs from **1 (noise) to 0 (image)**. The list of times is called the *schedule*. Its steps are not equally
# long: the schedule is *shifted* towards the noise, where the layout of the image is decided. The amount of the shift
# is called `mu`, and `mu = 0` means no shift. (*dev* and *schnell*, which needs fewer steps, are two published
# variants of FLUX.1.) FLUX.1-dev shifts more for larger images (schnell does not shift). The
# miniature uses one `mu` for all its sizes, the value with which it draws best.

# %%
from fluxedu.sampling.solvers import schedule, shift_amount

times = out.trajectory.times
print("FLUX.1's mu for 256 tokens:", round(shift_amount(256), 3), "· for 4096 tokens:", round(shift_amount(4096), 3))
print(
    "the miniature's mu for any size:",
    pipe.defaults.shift_ends[0],
    "(the logarithm of 3: the shift multiplies the ratio t / (1 - t) by three)",
)
fig, ax = plt.subplots(figsize=(5.6, 3))
ax.plot(schedule(20, 64, shift=False), "o-", ms=3, color="0.6", label="no shift")
ax.plot(schedule(20, 256), "o-", ms=3, color="#0072B2", label="FLUX.1, 256 tokens (256 × 256)")
ax.plot(schedule(20, 4096), "o-", ms=3, color="#D55E00", label="FLUX.1, 4096 tokens (1024 × 1024)")
ax.plot(times, "k--", lw=1, label="this image")
ax.set(xlabel="step", ylabel="time t (1 = noise)", xticks=range(0, 21, 5))
near_noise = [int((schedule(20, 4096, shift=shift)[:-1] > 0.5).sum()) for shift in (True, False)]
ax.set_title(
    f"At 4096 tokens FLUX.1 starts {near_noise[0]} of 20 steps above t = 0.5, without the shift {near_noise[1]}"
)
_ = ax.legend(frameon=False)

# %% [markdown]
# ## 5 · One evaluation of the network
#
# The inputs are the noisy tokens, the text and the time. With $x_0$ for the image and $x_1$ for the noise, a state at
# time $t$ is a mixture of both, and the output is a **velocity**: for each token, the direction from the image to the
# noise.
#
# $$x_t = (1 - t)\, x_0 + t\, x_1 \qquad v = x_1 - x_0$$
#
# So one velocity already implies a prediction of the final image, called the *predicted x0*. You will write it below.
#
# The network has one more input, the **guidance scale**: how strongly the image should follow the prompt (3.5 is usual
# for FLUX.1-dev, 6 is the miniature's default). Notebook 12 is about it.


# %%
def velocity(x, t):
    """Evaluate the network once: tokens x [1, 64, 64] at time t -> velocity [1, 64, 64]."""
    guidance = torch.tensor([pipe.defaults.guidance], device=device) if pipe.flux.config.guidance_embed else None
    with torch.no_grad():
        return pipe.flux(x, img_ids, txt, txt_ids, torch.tensor([t], device=device), pooled, guidance)


def show(tokens, ax, title):
    """Decode image tokens and draw the image."""
    with torch.no_grad():
        pixels = pipe.autoencoder.decode(unpack(tokens, height, width))[0].float().cpu()
    ax.imshow(((pixels.clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
    ax.set_title(title, fontsize=9)
    ax.axis("off")


v = velocity(x, 1.0)
print("velocity:", tuple(v.shape))

# %% exercise="picture.predicted_x0"

# %%
if fe.passed("picture.predicted_x0"):
    fig, axes = plt.subplots(1, 2, figsize=(6, 3))
    show(x, axes[0], "pure noise, decoded")
    show(predicted_x0(x, v, 1.0), axes[1], "predicted x0")
    fig.suptitle("One evaluation on pure noise already predicts a blurred image", fontsize=10)
    plt.show()

# %% [markdown]
# Pure noise tells the network nothing about the image, so many images are still possible, and the predicted x0 is
# blurred and pale. A network that had reached the smallest possible training loss would predict the average of all
# images that fit the prompt. Does this one? For each of 16 prompts we average 64 images. Then we predict x0 from eight
# other noises and compare it with the average, all at guidance scale 1, where guidance does nothing. This takes too
# long for a notebook, so here and on later pages `evidence.load` reads the stored results of such an experiment; its
# code is in the folder `evidence/` of the repository. (In brackets: a 95 % interval. It says how far the number may be
# from the true one with this number of images; notebook 15b explains it. It leaves out the choice of the prompts.)

# %%
stored = evidence.load("first_prediction")["1"]
nearest, distance = stored["the own average is the nearest"], stored["distance from the prompt's own average"]
print("nearest to its own prompt's average:", evidence.percent(nearest), "(chance: 6 %)")
print("distance from this average, divided by the norm of the average:", evidence.number(distance, 1))

# %% [markdown]
# The predicted x0 contains some information about the prompt, but it is far from the average.
#
# So we take a small step against the velocity and evaluate the network again, twenty times.
#
# ## 6 · The sampling loop
#
# Now you write the loop that turns noise into an image. The method is Euler's: in each step, the velocity is treated as
# constant. The time decreases, so `t_next − t` is negative, and each step moves away from the noise:
#
# $$x_{t'} = x_t + (t' - t)\, v(x_t, t)$$

# %% exercise="picture.euler"

# %% [markdown]
# Your loop now runs on the trained network, from the same noise and with the same times as the pipeline.

# %%
if fe.passed("picture.euler", "picture.predicted_x0"):
    states = euler(velocity, x, times.tolist())
    x0 = [predicted_x0(z, velocity(z, t), t) for z, t in zip(states, times[:-1].tolist())]
    steps_to_show = [0, 2, 5, 9, 14, 19]
    fig, axes = plt.subplots(2, len(steps_to_show), figsize=(11, 4.2))
    for column, i in enumerate(steps_to_show):
        show(states[i], axes[0, column], f"x at t = {times[i]:.2f}")
        show(x0[i], axes[1, column], "predicted x0")
    x_error, x0_error = (float((z[5] - states[-1]).norm() / states[-1].norm()) for z in (states, x0))
    fig.suptitle(
        f"At t = {times[5]:.2f} the state x (top) differs from the final latent by {x_error:.0%} of its length, "
        f"the predicted x0 (bottom) by {x0_error:.0%}",
        fontsize=10,
    )
    plt.show()

# %% [markdown]
# ## 7 · From tokens to pixels
#
# Unpack the last tokens, decode the latent, round to 8 bits. Is your image the one that the pipeline produced? (In
# brackets: the largest difference that rounding explains.)

# %%
from fluxedu.sampling.images import to_images

if fe.passed("picture.euler"):
    last = unpack(euler(velocity, x, times.tolist())[-1], height, width)
    with torch.no_grad():
        my_image = to_images(pipe.autoencoder.decode(last))[0]
    course.compare("your last latent and the pipeline's", last, out.latents, within=1e-3)
    difference = np.abs(np.asarray(my_image, int) - np.asarray(out.images[0], int)).max()
    print("largest difference of a pixel value (0 to 255) from the pipeline's image: at most", max(1, difference))

# %% [markdown]
# ## 8 · Look inside
#
# Every value that you computed by hand also passed through a **site**, a named point inside the model where a value can
# be recorded or replaced. The explorer below shows all of them: choose a part of the model, then one of its sites, and
# see the values from the run. Use the mouse or the keyboard (Tab, then the arrow keys); the slider sets the time. Try
# `vec`, which is the same for every token, and then `single.0.attn.map`.

# %%
print(len(fe.sites(pipe)), "sites")
widgets.architecture(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# Text acts on the image mainly through *attention*, in which each token collects information from all tokens, from some
# more and from others less. We say that it *attends* to the tokens from which it takes much. Point at a patch of the
# left image: the brightness shows how much that patch attends to each other patch, and the shade of each word shows how
# much it attends to that word. Point at a word: the right image shows which patches attend to it. Can you find a block
# in which mostly patches of the square attend to *blue*?

# %%
widgets.attention(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## 9 · Break it
#
# Each line of `trials` below changes one input of the network. Guess first which changes affect its output at all, and
# which change affects it most.

# %%
t = times[6:7].to(device)  # the time of the state below
guidance = torch.tensor([pipe.defaults.guidance], device=device) if pipe.flux.config.guidance_embed else None
state = pack(out.trajectory.latents[6].to(device, pipe.dtype))
shuffled = txt[:, torch.randperm(txt.shape[1], generator=torch.Generator().manual_seed(0))]
with torch.no_grad():
    unchanged = pipe.flux(state, img_ids, txt, txt_ids, t, pooled, guidance)
    trials = {
        "shuffle T5's token vectors": pipe.flux(state, img_ids, shuffled, txt_ids, t, pooled, guidance),
        "add 5 to all position ids": pipe.flux(state, img_ids + 5, txt, txt_ids + 5, t, pooled, guidance),
        "add 5 to the image's ids only": pipe.flux(state, img_ids + 5, txt, txt_ids, t, pooled, guidance),
        "swap rows and columns": pipe.flux(state, img_ids[:, [0, 2, 1]], txt, txt_ids, t, pooled, guidance),
        "set T5's vectors to zero": pipe.flux(state, img_ids, 0 * txt, txt_ids, t, pooled, guidance),
    }
change = {}
for name, output in trials.items():
    change[name] = float((output - unchanged).norm() / unchanged.norm())
    print(f"{name:<34}", "no change (below 1 in 100,000)" if change[name] < 1e-5 else f"changes by {change[name]:.0%}")
shuffle_effect.against("yes" if change["shuffle T5's token vectors"] > 1e-5 else "no")
larger_effect.against("text" if change["set T5's vectors to zero"] > change["swap rows and columns"] else "rows")

# %% [markdown]
# Shuffling the text tokens changes nothing: the transformer treats them as a set without order. Adding the same number
# to all position ids changes nothing either: only differences between positions count. Notebooks 03b and 04 explain
# why.
#
# ## In five lines
#
# 1. The text encoders turn a prompt into one vector (CLIP) and one vector per token (T5).
# 2. The transformer works on a latent: 64 tokens of 64 numbers here, 4,096 tokens for a 1024 × 1024 image.
# 3. The network predicts a velocity, `noise − image`; every velocity implies a prediction of the final image.
# 4. Sampling, with Euler's method, moves against the velocity from t = 1 to t = 0, on a schedule that FLUX.1-dev and
#    the miniature shift towards the noise.
# 5. The autoencoder decodes the last latent into pixels.
#
# **Questions people ask:** *Why are all text positions zero?* The usual explanation is that T5's vectors already
# contain the order ([flux 71](https://github.com/black-forest-labs/flux/issues/71)). *Is CLIP's vector pooled?* Yes, at
# the end-of-text token ([flux 64](https://github.com/black-forest-labs/flux/issues/64)). *Do these notebooks run on the
# full model?* If you set `FLUXEDU_MODEL=dev` before you start Jupyter, they load it; notebooks 12, 12b, 14 to 15b, most
# of 02b and a part of 10b load the miniatures by name and stay as they are. The findings in the text and the error
# bounds are those of the miniature: dev computes in bfloat16, which has fewer than three decimal digits, so a
# comparison may say *more than rounding*. If an explorer would need more memory than its limit, it says so and tells
# you how to record less.
#
# **Read:** `fluxedu/sampling/pipeline.py`, then `sampling.py` of black-forest-labs/flux, then *Scaling Rectified Flow
# Transformers* (arXiv 2403.03206).

# %%
fe.score()
