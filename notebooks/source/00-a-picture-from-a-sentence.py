# %% [markdown]
# # 00 · A picture from a sentence
#
# **What happens between a prompt and a picture?** FLUX.1 came from Black Forest Labs in August 2024, with code and weights
# and without a paper. You will run its whole path once, then open every
# stage and look at the tensor it hands on. At the end you will have run the sampling loop line by line and
# got the same picture, to within one grey level of 255.
#
# 40 minutes · everything runs on a laptop's CPU · the model is the miniature that ships with fluxedu: the
# same code as the 12-billion-parameter FLUX.1, with smaller numbers in its config, trained on pictures of
# coloured shapes.
#
# ```
# prompt ─ tokenizers ─┬─ CLIP ── one vector ──────────────┐
#                      └─ T5 ──── a vector per token ──┐   │
# seed ─── noise ─── packed to tokens ──► Flux, once per step ──► unpacked ─ autoencoder ─ picture
#                                       times from 1 to 0, guidance
# ```

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import fluxedu as fe
from fluxedu import course, widgets

device = course.begin()  # a GPU where there is one
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square on a white background"
out = pipe(prompt, seed=4, steps=20, progress=False)
out.images[0].resize((256, 256))

# %% [markdown]
# That is the whole of it: one line. `out` also kept the way there. Before you go on, say what you expect; the page
# will measure it and keep your score. The picture itself has 128 × 128 × 3 = 49,152 numbers.

# %%
numbers = fe.predict("how many numbers describe the picture while FLUX works on it?", 4096)  # answer
order = fe.predict(
    "shuffle the prompt's tokens before the transformer: does its answer change? yes / no", "no"
)  # answer
most = fe.predict("which moves the answer more: erase the text or swap rows and columns? text / rows", "text")  # answer

# %%
numbers.against(out.latents.numel())
print("latent:", tuple(out.latents.shape), "=", out.latents.numel(), "numbers")
print("a picture has", np.asarray(out.images[0]).size // out.latents.numel(), "times as many")

# %% [markdown]
# ## 1 · Words become pieces
#
# Two tokenizers cut the prompt. T5's pieces begin with `▁` where a word begins; CLIP's end with `</w>`
# where a word ends. In this small world nearly every word is one piece. Both lists are padded to a fixed
# length, because a batch needs a rectangle. FLUX
# has no mask for it: the padding is read like any word.

# %%
encoder = pipe.prompt_encoder
print("T5  :", *encoder.t5_tokenizer.pieces(prompt))
print("CLIP:", *encoder.clip_tokenizer.pieces(prompt))
t5_ids, clip_ids = encoder.t5_tokenizer([prompt]).to(device), encoder.clip_tokenizer([prompt]).to(device)
print("ids :", tuple(t5_ids.shape), "for T5,", tuple(clip_ids.shape), "for CLIP")

# %% [markdown]
# ## 2 · Pieces become vectors
#
# CLIP makes **one** vector of the whole prompt; it will steer every block (layer) of the transformer. T5 makes a vector **per token**;
# they will sit beside the image's tokens and be looked at. In FLUX.1 the same two come from CLIP-L
# (768 numbers) and T5-XXL (4,096 per token).

# %%
with torch.no_grad():
    txt = encoder.t5(t5_ids)  # [1, L, D]
    pooled = encoder.clip(clip_ids)[1]  # [1, D']
print("T5  :", tuple(txt.shape), " one row a token")
print("CLIP:", tuple(pooled.shape), "   one row a prompt")

words = encoder.t5_tokenizer.pieces(prompt)
like = torch.nn.functional.cosine_similarity(txt[0, :, None], txt[0, None], dim=-1)[: len(words), : len(words)]
fig, ax = plt.subplots(figsize=(6, 4.8), layout="constrained")
shown = ax.imshow(like.float().cpu(), cmap="cividis", vmin=-0.2, vmax=1)
ax.set_xticks(range(len(words)), words, rotation=90)
ax.set_yticks(range(len(words)), words)
ax.set_title("red and circle are alike, blue and square are alike")
_ = fig.colorbar(shown, label="cosine similarity", shrink=0.8)

# %% [markdown]
# Look at two pairs beside the diagonal: *red* and *circle*, *blue* and *square* are alike; *red* and *square* are not.
# Little words resemble each other too, and yet the three *a* are three vectors. T5 has read the whole sentence before FLUX sees a single token. It must: FLUX gives
# every text token the same position, so the order of words reaches it only
# through T5's vectors and CLIP's.

# %% [markdown]
# ## 3 · Noise becomes tokens
#
# The picture starts as noise in the autoencoder's **latent** space: 16 channels on a grid of cells, each
# cell standing for 8 × 8 pixels. Two by two cells are packed into one token, so a 128 × 128 picture is
# 8 × 8 = 64 tokens of 64 numbers.

# %%
from fluxedu.sampling.latents import draw_noise, image_ids, pack, text_ids, unpack

height, width = out.latents.shape[-2:]  # in cells
noise = draw_noise(seed=4, channels=16, height=height, width=width).to(device, pipe.dtype)  # [1, 16, 16, 16]
x = pack(noise)  # [1, 64, 64]
img_ids, txt_ids = image_ids(height, width).to(device), text_ids(txt.shape[1]).to(device)
print("noise :", tuple(noise.shape))
print("tokens:", tuple(x.shape))
print("packing loses nothing:", torch.equal(unpack(x, height, width), noise))
print("positions of the first image tokens (frame, row, column):", img_ids[:3].int().tolist())
print("positions of all text tokens:", txt_ids.unique(dim=0).int().tolist())

# %% [markdown]
# ## 4 · The clock
#
# Time runs from **1 (noise) to 0 (picture)**. The steps are not even: they are shifted towards the noise,
# where the layout is decided. The strength of the shift is called `mu`, and 0 is none. FLUX.1-dev
# takes more of it the larger the picture (schnell takes none); the miniature has one strength for all its sizes, because it draws best
# with it.

# %%
from fluxedu.sampling.solvers import schedule, shift_amount

times = out.trajectory.times
print("FLUX.1's mu for 256 tokens:", round(shift_amount(256), 3), "· for 4096 tokens:", round(shift_amount(4096), 3))
print(
    "the miniature's at any size:",
    pipe.defaults.shift_ends[0],
    "(the logarithm of 3: it makes the odds t : 1 - t three times as large)",
)
fig, ax = plt.subplots(figsize=(5.6, 3))
ax.plot(schedule(20, 64, shift=False), "o-", ms=3, color="0.6", label="even")
ax.plot(schedule(20, 256), "o-", ms=3, color="#0072B2", label="FLUX.1, 256 tokens (256 × 256)")
ax.plot(schedule(20, 4096), "o-", ms=3, color="#D55E00", label="FLUX.1, 4096 tokens (1024 × 1024)")
ax.plot(times, "k--", lw=1, label="this picture")
ax.set(xlabel="step", ylabel="time t (1 = noise)", xticks=range(0, 21, 5))
ax.set_title("In FLUX.1, larger pictures spend more steps near the noise")
_ = ax.legend(frameon=False)

# %% [markdown]
# ## 5 · One question to Flux
#
# Given the noisy tokens, the text and the time, the network answers with a **velocity**: for each token,
# the direction from the picture to the noise, `v = noise − picture`. Since `x_t = (1 − t)·picture + t·noise`,
# one answer already implies a guess of the whole picture: `x_t − t·v`.
#
# The network takes one more number, the **guidance** strength: how closely to follow the prompt
# (FLUX.1-dev is mostly asked with 3.5, the miniature with 6). A later notebook is about it.


# %%
def velocity(x, t):
    """Ask the network once: x [1, 64, 64] at time t -> velocity [1, 64, 64]."""
    guidance = torch.tensor([pipe.defaults.guidance], device=device) if pipe.flux.config.guidance_embed else None
    with torch.no_grad():
        return pipe.flux(x, img_ids, txt, txt_ids, torch.tensor([t], device=device), pooled, guidance)


def show(tokens, ax, title):
    """Decode tokens and draw them."""
    with torch.no_grad():
        pixels = pipe.autoencoder.decode(unpack(tokens, height, width))[0].float().cpu()
    ax.imshow(((pixels.clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
    ax.set_title(title, fontsize=9)
    ax.axis("off")


v = velocity(x, 1.0)
print("velocity:", tuple(v.shape))
fig, axes = plt.subplots(1, 2, figsize=(6, 3))
show(x, axes[0], "pure noise, decoded")
show(x - 1.0 * v, axes[1], "foreseen by one answer")
fig.suptitle("One answer to pure noise already holds a first idea of the picture", fontsize=10)

# %% [markdown]
# From pure noise the network can only foresee an average of all pictures that fit the prompt: blurred and
# pale, but with the background and two spots where the things will be. So we take a small step against the velocity, and
# ask again.

# %% [markdown]
# ## 6 · The loop
#
# This is all of sampling (Euler's method). Time falls, so `t_next − t` is negative: we walk away from the
# noise.

# %%
states, foreseen = [x], []
for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
    v = velocity(x, t)
    foreseen.append(x - t * v)
    x = x + (t_next - t) * v
    states.append(x)

picks = [0, 2, 5, 9, 14, 19]
fig, axes = plt.subplots(2, len(picks), figsize=(11, 4.2))
for column, i in enumerate(picks):
    show(states[i], axes[0, column], f"t = {times[i]:.2f}")
    show(foreseen[i], axes[1, column], "foreseen")
_ = fig.suptitle("The state (above) is noise for long; the foreseen picture (below) finds its places early")

# %% [markdown]
# ## 7 · Tokens become a picture
#
# Unpack, decode, round to 8 bits. Is it the picture the pipeline drew?

# %%
from fluxedu.sampling.images import to_images

with torch.no_grad():
    mine = to_images(pipe.autoencoder.decode(unpack(x, height, width)))[0]
difference = np.abs(np.asarray(mine, int) - np.asarray(out.images[0], int)).max()
print("by hand and by the pipeline alike, to 1 grey level of 255:", bool(difference <= 1))

# %% [markdown]
# ## 8 · Look inside
#
# Everything you have just done by hand passed through named places, **sites**. Here is the map of them all: choose a
# part of the model, then one of its sites, and see what went by while the picture was drawn. Mouse or keyboard
# (Tab, then the arrow keys); the slider is the time. Try `vec`, which is the same for every token, and then
# `single.0.attn.map`.

# %%
print(len(fe.sites(pipe)), "sites")
widgets.architecture(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# Attention is where the words get into the picture. Point at a patch of the left picture: brightness is what the
# patch looks at, and the shade of a word is what it takes from that word. Point at a word: the right picture
# shows who looks at it. Find a block in which *blue* is looked at mostly from the square.

# %%
widgets.attention(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## 9 · Break it
#
# Each line below changes one thing. Guess first which of them change the network's
# answer at all, and which changes it most.

# %%
once = times[6:7].to(device)  # the time that belongs to the state below
guidance = torch.tensor([pipe.defaults.guidance], device=device) if pipe.flux.config.guidance_embed else None
start = states[6]
shuffled = txt[:, torch.randperm(txt.shape[1], generator=torch.Generator().manual_seed(0))]
with torch.no_grad():
    base = pipe.flux(start, img_ids, txt, txt_ids, once, pooled, guidance)
    trials = {
        "shuffle the T5 tokens": pipe.flux(start, img_ids, shuffled, txt_ids, once, pooled, guidance),
        "shift all positions by 5": pipe.flux(start, img_ids + 5, txt, txt_ids + 5, once, pooled, guidance),
        "shift the image's positions only": pipe.flux(start, img_ids + 5, txt, txt_ids, once, pooled, guidance),
        "swap rows and columns": pipe.flux(start, img_ids[:, [0, 2, 1]], txt, txt_ids, once, pooled, guidance),
        "erase T5's vectors": pipe.flux(start, img_ids, 0 * txt, txt_ids, once, pooled, guidance),
    }
moved = {}
for name, changed in trials.items():
    by = float((changed - base).norm() / base.norm())
    print(f"{name:<34}", "no change (below 1 in 100,000)" if by < 1e-5 else f"changes by {by:.0%}")
    moved[name] = by
order.against("yes" if moved["shuffle the T5 tokens"] > 1e-5 else "no")
most.against("text" if moved["erase T5's vectors"] > moved["swap rows and columns"] else "rows")

# %% [markdown]
# Shuffling the text tokens does nothing: to the transformer they are a bag. Moving everything does nothing:
# only differences of positions count. Later notebooks take these two apart.
#
# ## In five lines
#
# 1. A prompt becomes one vector (CLIP) and a vector per token (T5).
# 2. A picture is worked on as a latent: 64 tokens of 64 numbers here; at 1024 × 1024, 4,096 tokens.
# 3. The network predicts a velocity, `noise − picture`; any answer implies a guess of the final picture.
# 4. Sampling is walking against the velocity from t = 1 to t = 0, on a schedule that FLUX.1-dev and the
#    miniature shift towards the noise.
# 5. The autoencoder turns the last latent into pixels.
#
# **People ask:** *Why are all text positions zero?* The usual explanation: T5 has already used
# the order ([flux 71](https://github.com/black-forest-labs/flux/issues/71)). *Is CLIP's vector pooled?* Yes, at the
# end-of-text token ([flux 64](https://github.com/black-forest-labs/flux/issues/64)). *Do these pages run on the large
# model?* With `FLUXEDU_MODEL=dev` set before Jupyter starts they open it, but for 14 and 15, which open the miniatures
# by name. What the text finds is the miniature's, and so are the bounds: dev calculates in bfloat16, with less than
# three digits, so that a line such as *the same to 1 in 1,000* may say False. An explorer that would have to keep more
# of a run than memory should hold says so, and how to ask for less.
#
# **To read:** `fluxedu/sampling/pipeline.py`, then `sampling.py` of black-forest-labs/flux, then *Scaling
# Rectified Flow Transformers* (arXiv 2403.03206).

# %%
fe.score()
