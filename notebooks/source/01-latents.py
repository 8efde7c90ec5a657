# %% [markdown]
# # 01 · Latents
#
# **Why not pixels?** FLUX never sees one. An autoencoder turns every 8 × 8 pixels into one cell of 16 numbers, the
# transformer works on those, and the autoencoder turns them back. You will build the way in and out of that space,
# put it into the trained model, and find out what gets lost on the way.
#
# Afterwards you can say how many tokens a picture costs, cut a latent into tokens and back, explain the two numbers
# 0.3611 and 0.1159, and predict which details survive.
#
# 50 minutes · needs notebook 00

# %%
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.nano.judge import read
from fluxedu.nano.scenes import Scene, Thing, render, scenes
from fluxedu.nano.training.autoencoder import psnr, to_tensor
from fluxedu.sampling import latents as library
from fluxedu.sampling.images import to_images

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
autoencoder = deepcopy(pipe.autoencoder).float()  # to measure with, whatever numbers the pipeline calculates in
prompt = "a red circle left of a blue square on a white background"
picture = pipe(prompt, seed=4, progress=False)

some = [scene for scene, _ in zip(scenes(1, size=(128, 128), held_out=True), range(4))]
images = to_tensor(np.stack([render(scene) for scene in some])).to(device)  # [4, 3, 128, 128] in [-1, 1]
course.where(pipe, "encoder", "image")

# %% [markdown]
# The two marked parts are one network of two halves. The encoder is needed only when a run begins with a picture,
# the decoder always, once, at the end.
#
# ## Predict
#
# Attention compares every token with every token. The judge is a small program of this course that finds shapes and colours in a
# picture by geometry, without a network. It will decide the third question: it reads a red star of any of these sizes without a mistake as long as nobody encodes it.

# %%
pairs = fe.predict("a token a pixel, 128 x 128 of them: how many times the pairs of 64 tokens?", 65536)  # answer
order = fe.predict("numbers in another order inside each token: the same / a bit worse / ruined", "ruined")  # answer
star = fe.predict("the smallest star that survives: radius 24 / 16 / 12 / 8 / 6 pixels", 12)  # answer
trips = fe.predict("encoding and decoding ten times instead of once: no worse / worse", "worse")  # answer

# %% [markdown]
# ## Why not pixels?
#
# What a picture would cost in tokens, and what it costs. A token of FLUX is 2 × 2 cells of the latent, so 16 × 16
# pixels.

# %%
for side in (128, 1024):
    pixels, cells, tokens = side**2, (side // 8) ** 2, (side // 16) ** 2
    print(f"{side:4} x {side}: {pixels:9,} pixels · {cells:6,} cells · {tokens:5,} tokens")
    print(f"{'':12} {3 * pixels:,} numbers become {16 * cells:,}, one in {3 * pixels // (16 * cells)}")
pairs.against((128 * 128) ** 2 // 64**2)

# %% [markdown]
# The numbers shrink to a twelfth, which is not much. The **tokens** shrink to a 256th, and the pairs of tokens
# that attention has to look at to a 65,536th. That is the answer to the question above.
#
# ## Build it
#
# First the 8. The encoder is a pyramid that halves the grid three times. Channels, rows and columns at each level:

# %%
with fe.record("ae.encoder.level.*", "ae.encoder.moments", "ae.latent") as rec:
    latent = autoencoder.encode(images[:1])
for name in [f"ae.encoder.level.{i}" for i in range(4)] + ["ae.encoder.moments", "ae.latent"]:
    print(f"{name:20} {list(rec[name].tensor.shape[-3:])}")

# %% [markdown]
# The fourth level does not halve. A halving is one convolution that moves by 2, with a detail that is easily got
# wrong.

# %% exercise="latents.Downsample"

# %%
halved = passed

# %% [markdown]
# At the bottom there are 32 channels: 16 means and 16 logarithms of variances, because the autoencoder is a variational one. It was
# trained to bear a little noise on its latent, so that small errors of the *flow* (the transformer, which learns to turn noise into
# latents) stay small in the picture.

# %% exercise="latents.standardise"

# %%
standardised = passed
print("numbers that the miniature uses:", autoencoder.config.scale_factor, autoencoder.config.shift_factor)
with fe.record("ae.encoder.moments") as rec:
    latent = autoencoder.encode(images)  # [4, 16, 16, 16]
moments = rec["ae.encoder.moments"].tensor.flatten(0, 1).to(device)  # [4, 32, 16, 16]
mean, logvar = moments.chunk(2, dim=1)
print(f"spread of the means before: {float(mean.std()):.1f} · of the latent: {float(latent.std()):.1f}")
print(f"the encoder's own noise, beside the spread: {float((logvar / 2).exp().mean() / mean.std()):.0%}")
if standardised:
    config = autoencoder.config
    yours = standardise(moments, config.scale_factor, config.shift_factor)
    print("yours is the library's latent, to 1 in 100,000:", bool((yours - latent).abs().max() < 1e-5))

# %% [markdown]
# So that is what `scale` and `shift` are for. Noise has spread 1 and mean 0, and the flow mixes it with the latent,
# `(1 − t)·latent + t·noise`. Both must be of one size, or "half noise" would not mean half. (Over many pictures the latent's spread is 1.0; the
# few above happen to be calm ones.) FLUX.1's two numbers,
# 0.3611 and 0.1159, do the same for its own autoencoder: a scale of 0.3611 undoes a spread of 1 / 0.3611.
#
# Now from the grid to tokens.

# %% exercise="latents.pack"

# %%
packed = passed

# %% exercise="latents.unpack"

# %%
packed = packed and passed
if packed:
    print("tokens:", list(pack(latent).shape))
    print("as the library's:", bool(torch.equal(pack(latent), library.pack(latent))))
    print("nothing is lost on the way back:", bool(torch.equal(unpack(pack(latent), 16, 16), latent)))

# %% [markdown]
# Packing is bookkeeping: no number changes. What changes is that the transformer then has a quarter of the
# tokens, each four times as wide.
#
# ## See it

# %%
fig, axes = plt.subplots(3, 6, figsize=(9, 5), layout="constrained")
axes[0, 0].imshow(picture.images[0])
axes[0, 0].set_title("the picture", fontsize=9)
shown = picture.latents[0].float().cpu()
for channel, ax in enumerate(axes.flat[1:17]):
    drawn = ax.imshow(shown[channel], cmap="cividis", vmin=-3, vmax=3)
    ax.set_title(f"channel {channel}", fontsize=9)
for ax in axes.flat:
    ax.axis("off")
fig.suptitle("The latent is still a small picture: its channels show the same two things in the same places")
fig.colorbar(drawn, ax=axes, label="value", shrink=0.6)
plt.show()

# %% [markdown]
# That the channels keep the places is what lets the transformer speak of rows and columns. It is also why a picture
# can be edited in its latent. Do 16 channels hold 16 different things? Keep only the few directions along which the
# latents vary most, and decode. (PSNR is the error in decibels: 20 means an error of a tenth of the range from black
# to white, 40 a hundredth.)

# %%
flat = latent.permute(0, 2, 3, 1).reshape(-1, 16)  # [cells, 16]
middle = flat.mean(0)
directions = torch.linalg.svd(flat - middle, full_matrices=False)[2]  # [16, 16], the strongest first
counts, quality = (1, 2, 3, 4, 6, 8, 12, 16), []
for count in counts:
    along = directions[:count].T @ directions[:count]
    few = ((flat - middle) @ along + middle).reshape(4, 16, 16, 16).permute(0, 3, 1, 2)  # [4, 16, h, w]
    quality.append(psnr(images, autoencoder.decode(few)))
thumbnails = {  # the same picture made small, then large again
    side: psnr(images, F.interpolate(F.avg_pool2d(images, 128 // side), size=128, mode="bilinear")) for side in (16, 32)
}

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(counts, quality, "o-", color="#0072B2", label="latent, 256 numbers a direction")
for (side, value), style in zip(thumbnails.items(), (":", "--")):
    ax.axhline(value, color="#D55E00", linestyle=style, label=f"{side} x {side} thumbnail, {3 * side * side:,} numbers")
ax.set_xlabel("directions kept, of 16")
ax.set_ylabel("PSNR in dB")
ax.set_title("Six directions carry almost all of it, and beat a thumbnail of twice the size")
ax.legend()
plt.show()
print("six directions lose less than 2 dB of all sixteen's:", quality[-1] - quality[4] < 2)
print("six directions, 1,536 numbers, beat a thumbnail of 3,072 numbers:", quality[4] > thumbnails[32])

# %% [markdown]
# The miniature's world is simple, so ten of the sixteen directions are nearly idle; the world of photographs is not.
# Earlier latent diffusion models had 4 channels, FLUX has 16: with 8 × 8 pixels a cell, detail has
# nowhere else to go.
#
# What is lost, then? A Fourier transform splits a picture into stripes of every width; compare the picture and its copy,
# width by width. (The grey line: half is lost.)

# %%
copy = autoencoder.decode(latent)
window = torch.hann_window(128, device=device)[:, None] * torch.hann_window(128, device=device)
cycles = torch.fft.fftfreq(128, device=device)
radius = (cycles[:, None] ** 2 + cycles[None, :] ** 2).sqrt()


def power(x: Tensor) -> Tensor:
    """How strong stripes of each width are, `[12]`, from wide to narrow."""
    strength = torch.fft.fft2((x - x.mean((-2, -1), keepdim=True)) * window).abs().square().mean((0, 1))
    edges = torch.linspace(0, 0.5, 13, device=device)
    return torch.stack([strength[(radius >= a) & (radius < b)].sum() for a, b in zip(edges, edges[1:])])


width = 1 / ((torch.arange(12) + 0.5) / 24)  # pixels from one stripe to the next
lost = (power(copy - images) / power(images)).cpu()
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.semilogx(width, 100 * lost, "o-", color="#0072B2")
ax.axhline(50, color="0.6", linewidth=1)
ax.set_xticks([2, 3, 4, 6, 10, 16, 48], [2, 3, 4, 6, 10, 16, 48])
ax.minorticks_off()
ax.set_xlabel("width of the stripes, pixels from one to the next")
ax.set_ylabel("error, % of their power")
ax.set_ylim(0, 100)
ax.set_title("Wide stripes come back whole, the finest are mostly lost")
plt.show()
print("lost of stripes wider than 9 pixels: below a tenth:", bool(lost[:3].max() < 0.1))
print("lost of the finest: more than half:", bool(lost[-2:].min() > 0.5))

# %% [markdown]
# How far does a cell reach? Change all 16 numbers of one, and see where the picture changes:

# %%
touched = latent[:1].clone()
touched[0, :, 8, 8] += 2
change = (autoencoder.decode(touched) - copy[:1]).square().sum((0, 1))  # [128, 128]
own, around = (float(change[64 - m : 72 + m, 64 - m : 72 + m].sum() / change.sum()) for m in (0, 8))
print("of the change, in the cell's own 8 x 8 pixels: more than two thirds:", own > 2 / 3)
print("in those and the eight cells around them: more than nine tenths:", around > 0.9)

# %% [markdown]
# Now by hand. Add to a few cells of one channel and see what it does; one cell alone is hardly seen.
# (Tab to the left picture and use the arrow keys, or the mouse.) Does any channel stand for one thing, a colour say?
# Nothing in training asks for that.

# %%
widgets.latents(pipe, picture.images[0]).set(channel=14, cell=(5, 11))

# %% [markdown]
# ## Put yours into the trained model
#
# Your halvings take the place of the encoder's, with its weights. Your tokens go into the transformer: at `img_in`,
# the first layer, the pipeline's tokens are thrown away and yours are read instead, at every step of the run.

# %%
if halved and packed:
    with fe.swap("ae.encoder.*.downsample", lambda old: Downsample(old.conv.in_channels), autoencoder):
        again = autoencoder.encode(images)
    print("the encoder with your halvings gives the same latent:", bool((again - latent).abs().max() < 1e-4))

    state = {}

    def remember(x, ctx):
        state["latent"] = x
        return x

    with fe.intervene("sample.x", remember):
        with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(pack(state["latent"]))):
            drawn = pipe(prompt, seed=4, progress=False)
    far = (drawn.latents - picture.latents).norm() / picture.latents.norm()
    print("the picture from your tokens is the same, to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# **Another order inside the token.** All 64 numbers are there, the tokens are the right ones, only the channel now
# changes fastest. It is the layout that `view` and `transpose` give by accident.

# %%
state = {}


def remember(x, ctx):
    state["latent"] = x
    return x


def channel_fastest(x):
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, 2, 2, C]
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


with fe.intervene("sample.x", remember):
    with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(channel_fastest(state["latent"]))):
        muddled = pipe(prompt, seed=4, progress=False)
far = float((muddled.latents - picture.latents).norm() / picture.latents.norm())
order.against("ruined" if far > 1 else "a bit worse" if far > 0.01 else "the same")

# %% [markdown]
# **Padding on the other side**, as `padding=1` would do, and **a latent that nobody scaled**, given to the decoder as
# the encoder made it. Both run without a complaint.


# %%
class LeftAbove(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


with fe.swap("ae.encoder.*.downsample", lambda old: LeftAbove(old.conv.in_channels), autoencoder):
    shifted = autoencoder.decode(autoencoder.encode(images))
unscaled = autoencoder.decode(mean)
good, off, pale = (psnr(images, x) for x in (copy, shifted, unscaled))
print("padding on the other side costs more than 10 dB:", good - off > 10)
print("forgetting the scale costs more than 3 dB:", good - pale > 3)

fig, axes = plt.subplots(1, 5, figsize=(10, 2.4), layout="constrained")
pictures = [muddled.images[0], *(to_images(x[:1])[0] for x in (images, copy, shifted, unscaled))]
names = ["tokens in another order", "a scene", "encoded, decoded", "padding left and above", "not scaled"]
for ax, image, name in zip(axes, pictures, names):
    ax.imshow(image)
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Order, padding, scale: each mistake loads without a word, and shows in the picture", fontsize=10)
plt.show()

# %% [markdown]
# The forgotten scale is the dangerous one: too much contrast, but a picture. In a flow that starts from such a latent
# it looks like a bad model.
#
# **A small star.** The judge reads stars before and after.

# %%
radii, kept, rows = (24, 16, 12, 8, 6), [], []
places = [(64, 64), (50.5, 70), (71, 43)]
for r in radii:
    drawn = [render(Scene("white", (Thing("star", "red", "small", x, y, r),), 128, 128)) for x, y in places]
    back = to_images(autoencoder.decode(autoencoder.encode(to_tensor(np.stack(drawn)).to(device))))
    stars = [sum([t.form for t in read(image).things] == ["star"] for image in those) for those in (drawn, back)]
    rows.append((drawn[0][36:92, 36:92], np.asarray(back[0])[36:92, 36:92]))
    kept.append(stars[1] == len(places))
    print(f"radius {r:2}: read as a star {stars[0]} times of 3 before, {stars[1]} times after")
star.against(min((r for r, whole in zip(radii, kept) if whole), default=0))

fig, axes = plt.subplots(2, 5, figsize=(8, 3.4), layout="constrained")
for column, (r, pair) in enumerate(zip(radii, rows)):
    for row, image in enumerate(pair):
        axes[row, column].imshow(image)
        axes[row, column].axis("off")
    axes[0, column].set_title(f"radius {r} px", fontsize=9)
fig.suptitle("Above as drawn, below through the autoencoder: the smaller the star, the rounder")
plt.show()

# %% [markdown]
# Two cells are 16 pixels, and a star of radius 8 has all five of its points in them. No transformer, however good,
# draws what the decoder cannot. The same holds for small faces and small letters in large models: make the picture
# larger, and the same thing gets more cells.
#
# **Ten times there and back**, as happens when a picture is edited, saved and edited again.

# %%
x, decibel = images[:2], []
for _ in range(10):  # there and back again
    x = autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)
    decibel.append(psnr(images[:2], x))
trips.against("worse" if decibel[-1] < decibel[0] - 1 else "no worse")
print("lost from the first to the tenth trip: more than 5 dB:", decibel[0] - decibel[-1] > 5)

# %% [markdown]
# ## In five lines
#
# 1. Pixels would be too many tokens: 16 × 16 of them are one token, and attention pays for pairs.
# 2. The encoder halves three times; each cell has 16 numbers, which keep the place and most of the look.
# 3. Scale and shift bring the latent to the spread of the noise that it is mixed with.
# 4. Packing takes 2 × 2 cells a token, (channel, row, column) inside; it loses nothing, and any other order ruins it.
# 5. What is finer than a few pixels is lost before the flow has drawn a stroke.
#
# **People ask**: *Does encoding draw a random sample?* The official code takes the mean when it is so configured,
# diffusers samples; the noise is a few percent of the spread, as you saw above. *Why does my 1000-pixel picture come
# out with another size?* A side must be whole tokens, 16 pixels each; the official code rounds up, to 126 cells,
# diffusers down, to 124. *Why does memory run out at large sizes?* The tokens grow with
# the area and their pairs with its square: twice the side, 16 times the pairs.
#
# **Read**: Latent Diffusion, arXiv 2112.10752 · Scaling Rectified Flow Transformers, arXiv 2403.03206 (why 16
# channels) · `black-forest-labs/flux`, `modules/autoencoder.py` and `sampling.py` · ours:
# `fluxedu/models/autoencoder.py`, `fluxedu/sampling/latents.py`.

# %%
fe.score()
