# %% [markdown]
# # 01 · Latents
#
# **Why not pixels?** FLUX never sees a pixel. An *autoencoder* (an encoder and a decoder network) turns every 8 × 8
# pixels into one *cell* of 16 numbers; the grid of cells is the image's *latent*. The transformer works on the latent,
# and the decoder turns the result back into pixels. You will build the steps in and out of the latent, put them into
# the trained model, and find out what gets lost on the way.
#
# Afterwards you can say how many tokens an image needs, cut a latent into tokens and put it together again, explain the
# two numbers 0.3611 and 0.1159, and predict which details survive.
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
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import Scene, SceneObject, render, scenes
from fluxedu.nano.exam import psnr
from fluxedu.nano.scenes import to_tensor
from fluxedu.sampling import latents as library
from fluxedu.sampling.images import to_images

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
autoencoder = deepcopy(pipe.autoencoder).float()  # a float32 copy to measure with, whatever the pipeline's dtype
prompt = "a red circle left of a blue square on a white background"
reference = pipe(prompt, seed=4, progress=False)

test_scenes = [scene for scene, _ in zip(scenes(1, size=(128, 128), held_out=True), range(4))]
images = to_tensor(np.stack([render(scene) for scene in test_scenes])).to(device)  # [4, 3, 128, 128] in [-1, 1]
course.where(pipe, "encoder", "image")

# %% [markdown]
# The diagram marks the two halves of the autoencoder. The encoder is needed only when a run starts from an image; the
# decoder is needed once at the end of every run.
#
# ## Predict
#
# Attention compares every token with every token, so its cost grows with the number of *pairs* of tokens. For the third
# question we draw red stars of five sizes, then encode and decode the images. The *judge*, a small program of this
# course that finds shapes and colours in an image by geometry, without a network, recognises all five stars before
# that. Which of them does it still recognise afterwards?

# %%
pair_ratio = fe.predict(
    "With one token per pixel at 128 x 128, how many times as many pairs are there as with 64 tokens?", 65536
)  # answer
reorder_effect = fe.predict(
    "The numbers inside each token are reordered. Is the image 'the same', 'a bit worse' or 'ruined'?", "ruined"
)  # answer
smallest_star = fe.predict(
    "What is the radius of the smallest star that the judge still recognises: 24, 16, 12, 8 or 6 pixels?", 12
)  # answer
round_trips = fe.predict(
    "An image is encoded and decoded ten times instead of once. Is the result 'no worse' or 'worse'?", "worse"
)  # answer

# %% [markdown]
# ## Why not pixels?
#
# Compare the number of pixels, cells and tokens. A token of FLUX is 2 × 2 cells of the latent, so it covers 16 × 16
# pixels.

# %%
for side in (128, 1024):
    pixels, cells, tokens = side**2, (side // 8) ** 2, (side // 16) ** 2
    print(f"{side:4} x {side}: {pixels:9,} pixels · {cells:6,} cells · {tokens:5,} tokens")
    print(f"{'':12} {3 * pixels:,} numbers become {16 * cells:,}, one in {3 * pixels // (16 * cells)}")
pair_ratio.against((128 * 128) ** 2 // 64**2)

# %% [markdown]
# The amount of data shrinks by a factor of 12. The number of **tokens** shrinks by a factor of 256, and the number of
# pairs that attention has to compare by a factor of 65,536, which answers the first question.
#
# ## Build it
#
# We begin with the factor 8. The encoder is a pyramid that halves the grid three times. `fe.record` stores the values
# that pass through the named *sites* (named points inside the model). These are the channels, rows and columns at each
# level:

# %%
with fe.record("ae.encoder.down.*.out", "ae.encoder.moments", "ae.latent") as rec:
    latent = autoencoder.encode(images[:1])
for name in [f"ae.encoder.down.{i}.out" for i in range(4)] + ["ae.encoder.moments", "ae.latent"]:
    print(f"{name:20} {list(rec[name].tensor.shape[-3:])}")

# %% [markdown]
# The fourth level does not halve the grid. Each halving is one convolution with stride 2, and its padding is easy to
# get wrong.

# %% exercise="latents.Downsample"

# %%
downsample_passed = passed

# %% [markdown]
# The encoder's last layer has 32 channels: 16 means and 16 logarithms of variances. This is a *variational*
# autoencoder, which was trained with noise of these variances added to the means. The decoder therefore tolerates small
# errors in the latent, and small errors of the *flow* (the transformer, which learns to turn noise into latents) stay
# small in the image.

# %% exercise="latents.standardise"

# %%
standardise_passed = passed
print("scale and shift of the miniature:", autoencoder.config.scale_factor, autoencoder.config.shift_factor)
with fe.record("ae.encoder.moments") as rec:
    latent = autoencoder.encode(images)  # [4, 16, 16, 16]
moments = rec["ae.encoder.moments"].tensor.flatten(0, 1).to(device)  # [4, 32, 16, 16]
mean, logvar = moments.chunk(2, dim=1)
print(f"standard deviation of the means: {float(mean.std()):.1f} · of the latent: {float(latent.std()):.1f}")
print(f"the encoder's own noise, relative to that of the means: {float((logvar / 2).exp().mean() / mean.std()):.0%}")
if standardise_passed:
    config = autoencoder.config
    yours = standardise(moments, config.scale_factor, config.shift_factor)
    print("yours equals the library's latent, to 1 in 100,000:", bool((yours - latent).abs().max() < 1e-5))

# %% [markdown]
# This is what `scale` and `shift` are for. Noise has mean 0 and standard deviation 1, and the flow mixes it with the
# latent, `(1 − t)·latent + t·noise`. Both must have the same scale, or t = 0.5 would not mean half noise. (Over many
# images the latent's standard deviation is 1.0; that of these four images happens to be smaller.) FLUX.1's two numbers,
# 0.3611 and 0.1159, do the same for its own autoencoder, whose means have a standard deviation of about
# 1 / 0.3611 = 2.8.
#
# Next come the tokens.

# %% exercise="latents.pack"

# %%
pack_passed = passed

# %% exercise="latents.unpack"

# %%
pack_passed = pack_passed and passed
if pack_passed:
    print("tokens:", list(pack(latent).shape))
    print("yours equal the library's:", bool(torch.equal(pack(latent), library.pack(latent))))
    print("unpacking restores the latent exactly:", bool(torch.equal(unpack(pack(latent), 16, 16), latent)))

# %% [markdown]
# Packing only reorders numbers; no value changes. Afterwards the transformer has a quarter as many tokens, each four
# times as wide.
#
# ## See it

# %%
fig, axes = plt.subplots(3, 6, figsize=(9, 5), layout="constrained")
axes[0, 0].imshow(reference.images[0])
axes[0, 0].set_title("the image", fontsize=9)
channels = reference.latents[0].float().cpu()
for channel, ax in enumerate(axes.flat[1:17]):
    heatmap = ax.imshow(channels[channel], cmap="cividis", vmin=-3, vmax=3)
    ax.set_title(f"channel {channel}", fontsize=9)
for ax in axes.flat:
    ax.axis("off")
fig.suptitle("The channels of the latent show the same two objects at the same positions as the image")
fig.colorbar(heatmap, ax=axes, label="value", shrink=0.6)
plt.show()

# %% [markdown]
# Because the channels preserve positions, the transformer can work with rows and columns, and an image can be edited in
# its latent. Are all 16 channels needed? The 16 numbers of a cell are a point in a space of 16 dimensions. Keep only
# the few directions in this space along which the latents vary most (their principal components), and decode. (*PSNR*,
# the peak signal-to-noise ratio, expresses the error in decibels: 20 dB is an error of a tenth of the range from black
# to white, 40 dB a hundredth.)

# %%
flat = latent.permute(0, 2, 3, 1).reshape(-1, 16)  # [cells, 16]
centre = flat.mean(0)
directions = torch.linalg.svd(flat - centre, full_matrices=False)[2]  # [16, 16], in order of variance
counts, quality = (1, 2, 3, 4, 6, 8, 12, 16), []
for count in counts:
    projection = directions[:count].T @ directions[:count]
    projected = (flat - centre) @ projection + centre  # [cells, 16]
    quality.append(psnr(images, autoencoder.decode(projected.reshape(4, 16, 16, 16).permute(0, 3, 1, 2))))
thumbnails = {  # the same images, downscaled and upscaled again
    side: psnr(images, F.interpolate(F.avg_pool2d(images, 128 // side), size=128, mode="bilinear")) for side in (16, 32)
}

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(counts, quality, "o-", color="#0072B2", label="latent, 256 numbers per direction")
for (side, value), style in zip(thumbnails.items(), (":", "--")):
    ax.axhline(value, color="#D55E00", linestyle=style, label=f"{side} x {side} thumbnail, {3 * side * side:,} numbers")
ax.set_xlabel("number of directions kept, of 16")
ax.set_ylabel("PSNR in dB")
ax.set_title(
    f"Six of 16 directions cost only {quality[-1] - quality[4]:.1f} dB, and beat a thumbnail of twice as many numbers"
)
ax.legend()
plt.show()
print("six directions lose less than 2 dB compared with all sixteen:", quality[-1] - quality[4] < 2)
print("six directions (1,536 numbers) beat a thumbnail of 3,072 numbers:", quality[4] > thumbnails[32])

# %% [markdown]
# The miniature's images are simple, so ten of the sixteen directions are hardly used; photographs need more. Earlier
# latent diffusion models had 4 channels, FLUX has 16: since a cell covers 8 × 8 pixels, detail can only be stored in
# the channels.
#
# Which details does the autoencoder lose? A Fourier transform writes an image as a sum of stripe patterns of all
# widths. We compare the image with its reconstruction at each width. (At the grey line, the error has half as much
# power as the image.)

# %%
reconstruction = autoencoder.decode(latent)
window = torch.hann_window(128, device=device)[:, None] * torch.hann_window(128, device=device)
cycles = torch.fft.fftfreq(128, device=device)
radius = (cycles[:, None] ** 2 + cycles[None, :] ** 2).sqrt()


def power(x: Tensor) -> Tensor:
    """Spectral power in 12 bands, from wide stripes to narrow ones: `[12]`."""
    spectrum = torch.fft.fft2((x - x.mean((-2, -1), keepdim=True)) * window).abs().square().mean((0, 1))
    edges = torch.linspace(0, 0.5, 13, device=device)
    return torch.stack([spectrum[(radius >= a) & (radius < b)].sum() for a, b in zip(edges, edges[1:])])


width = 1 / ((torch.arange(12) + 0.5) / 24)  # pixels from one stripe to the next
error_share = (power(reconstruction - images) / power(images)).cpu()
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.semilogx(width, 100 * error_share, "o-", color="#0072B2")
ax.axhline(50, color="0.6", linewidth=1)
ax.set_xticks([2, 3, 4, 6, 10, 16, 48], [2, 3, 4, 6, 10, 16, 48])
ax.minorticks_off()
ax.set_xlabel("width of the stripes: pixels from one to the next")
ax.set_ylabel("error, % of the power")
ax.set_ylim(0, 100)
ax.set_title(
    f"The error is {error_share[0]:.0%} of the power for the widest stripes, {error_share[-1]:.0%} for the narrowest"
)
plt.show()
print("for stripes wider than 9 pixels the error is less than a tenth of the power:", bool(error_share[:3].max() < 0.1))
print("for the narrowest stripes it is more than half:", bool(error_share[-2:].min() > 0.5))

# %% [markdown]
# How far does the influence of one cell reach? Change all 16 numbers of one cell, and see where the image changes:

# %%
edited = latent[:1].clone()
edited[0, :, 8, 8] += 2
change = (autoencoder.decode(edited) - reconstruction[:1]).square().sum((0, 1))  # [128, 128]
own_cell, neighbourhood = (float(change[64 - m : 72 + m, 64 - m : 72 + m].sum() / change.sum()) for m in (0, 8))
print("more than two thirds of the change is in the cell's own 8 x 8 pixels:", own_cell > 2 / 3)
print("more than nine tenths is in these and the eight cells around them:", neighbourhood > 0.9)

# %% [markdown]
# Now edit a latent yourself. Change the values of a few cells in one channel and see what happens to the image; a
# change of a single cell is hardly visible. (Tab to the left image and use the arrow keys, or use the mouse.) Does any
# channel stand for one property, such as a colour? Nothing in the training requires that.

# %%
widgets.latents(pipe, reference.images[0]).set(channel=14, cell=(5, 11))

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules of the model by yours and copies the trained weights into them; here it replaces the
# encoder's downsampling layers. `fe.intervene` replaces the value at a site; here it replaces the tokens at `img_in`,
# the transformer's first layer, by your tokens in every step of the run.

# %%
if downsample_passed and pack_passed:
    with fe.swap("ae.encoder.*.downsample", lambda old: Downsample(old.conv.in_channels), autoencoder):
        yours = autoencoder.encode(images)
    print("the encoder with your layers gives the same latent:", bool((yours - latent).abs().max() < 1e-4))

    state = {}

    def remember(x, ctx):
        state["latent"] = x
        return x

    with fe.intervene("sample.x", remember):
        with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(pack(state["latent"]))):
            out = pipe(prompt, seed=4, progress=False)
    difference = (out.latents - reference.latents).norm() / reference.latents.norm()
    print("the latent made from your tokens is the same, to 1 in 1,000:", bool(difference < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# **Another order inside the token.** Each token contains the right 64 numbers, but in another order: now the channel
# changes fastest. A wrong `view` or `transpose` easily produces this order by accident.

# %%
state = {}


def remember(x, ctx):
    state["latent"] = x
    return x


def pack_channel_fastest(x):
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, 2, 2, C]
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


with fe.intervene("sample.x", remember):
    with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(pack_channel_fastest(state["latent"]))):
        reordered = pipe(prompt, seed=4, progress=False)
difference = float((reordered.latents - reference.latents).norm() / reference.latents.norm())
reorder_effect.against("ruined" if difference > 1 else "a bit worse" if difference > 0.01 else "the same")

# %% [markdown]
# **Padding on the other side**, as `padding=1` does, and **no scaling**: the encoder's means go to the decoder without
# scale and shift. Neither raises an error.


# %%
class PadLeftAbove(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


with fe.swap("ae.encoder.*.downsample", lambda old: PadLeftAbove(old.conv.in_channels), autoencoder):
    wrong_padding = autoencoder.decode(autoencoder.encode(images))
unscaled = autoencoder.decode(mean)
psnr_right, psnr_padding, psnr_unscaled = (psnr(images, x) for x in (reconstruction, wrong_padding, unscaled))
print("padding on the other side costs more than 10 dB:", psnr_right - psnr_padding > 10)
print("no scaling costs more than 3 dB:", psnr_right - psnr_unscaled > 3)

fig, axes = plt.subplots(1, 5, figsize=(10, 2.4), layout="constrained")
examples = [reordered.images[0], *(to_images(x[:1])[0] for x in (images, reconstruction, wrong_padding, unscaled))]
names = ["tokens in another order", "an original", "encoded and decoded", "padded left and above", "not scaled"]
for ax, image, name in zip(axes, examples, names):
    ax.imshow(image)
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Wrong order, wrong padding, no scaling: none raises an error, each damages the image", fontsize=10)
plt.show()

# %% [markdown]
# The missing scale is the most dangerous mistake, because the result still looks like an image, only with too much
# contrast. When a run starts from such a latent, it is easy to blame the model.
#
# **A small star.** The judge looks for stars before and after the autoencoder.


# %%
def stars(images) -> int:
    """In how many of the images the judge finds exactly one object, a star."""
    return sum([found.form for found in detect(image).objects] == ["star"] for image in images)


radii, all_recognised, examples = (24, 16, 12, 8, 6), [], []
centres = [(64, 64), (50.5, 70), (71, 43)]
for r in radii:
    originals = [render(Scene("white", (SceneObject("star", "red", "small", x, y, r),), 128, 128)) for x, y in centres]
    decoded = to_images(autoencoder.decode(autoencoder.encode(to_tensor(np.stack(originals)).to(device))))
    before, after = stars(originals), stars(decoded)
    examples.append((originals[0][36:92, 36:92], np.asarray(decoded[0])[36:92, 36:92]))
    all_recognised.append(after == len(centres))
    print(f"radius {r:2}: recognised as a star {before} times of 3 before, {after} times after")
smallest = min((r for r, recognised in zip(radii, all_recognised) if recognised), default=0)
smallest_star.against(smallest)

fig, axes = plt.subplots(2, 5, figsize=(8, 3.4), layout="constrained")
for column, (r, pair) in enumerate(zip(radii, examples)):
    for row, image in enumerate(pair):
        axes[row, column].imshow(image)
        axes[row, column].axis("off")
    axes[0, column].set_title(f"radius {r} px", fontsize=9)
fig.suptitle(
    f"Top: original. Bottom: encoded and decoded. Below a radius of {smallest} pixels, stars lose their points"
)
plt.show()

# %% [markdown]
# A star of radius 8 fits into a square of two by two cells, with all of its five points. However good the transformer
# is, it cannot draw what the decoder cannot. The same holds for small faces and small letters in large models. It helps
# to generate a larger image, in which the same object covers more cells.
#
# **Ten round trips**, as happens when an image is edited, saved and edited again.

# %%
x, decibel = images[:2], []
for _ in range(10):  # encode and decode
    x = autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)
    decibel.append(psnr(images[:2], x))
round_trips.against("worse" if decibel[-1] < decibel[0] - 1 else "no worse")
print("from the first to the tenth round trip, more than 5 dB are lost:", decibel[0] - decibel[-1] > 5)

# %% [markdown]
# ## In five lines
#
# 1. Pixels would be too many tokens: one token covers 16 × 16 pixels, and the cost of attention grows with the pairs.
# 2. The encoder halves the grid three times; each cell has 16 numbers, and the latent preserves positions.
# 3. Scale and shift give the latent the mean and standard deviation of the noise that it is mixed with.
# 4. Packing puts 2 × 2 cells into one token, in the order (channel, row, column). It loses nothing. A trained
#    transformer works with this order only.
# 5. Detail finer than a few pixels is lost in the autoencoder, whatever the transformer does.
#
# **Questions people ask**: *Does encoding draw a random sample?* The official code takes the mean if so configured,
# diffusers samples; the noise is a few percent of the standard deviation, as you measured above. *Why does my
# 1000-pixel image come out with another size?* A side must be a whole number of tokens of 16 pixels. The official code
# rounds up, to 126 cells of 8 pixels; diffusers rounds down, to 124. *Why does memory run out at large sizes?* The
# number of tokens grows with the area, and the number of pairs with its square: twice the side means 16 times the
# pairs.
#
# **Read**: Latent Diffusion, arXiv 2112.10752 · Scaling Rectified Flow Transformers, arXiv 2403.03206 (why 16
# channels) · `black-forest-labs/flux`, `modules/autoencoder.py` and `sampling.py` · ours:
# `fluxedu/models/autoencoder.py`, `fluxedu/sampling/latents.py`.

# %%
fe.score()
