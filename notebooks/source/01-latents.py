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
# 80 minutes, in two sittings: stop before “See it” · needs notebook 00

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

test_scenes = [scene for scene, _ in zip(scenes(1, size=(128, 128), held_out=True), range(16))]
images = to_tensor(np.stack([render(scene) for scene in test_scenes])).to(device)  # [16, 3, 128, 128] in [-1, 1]
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
# that. Which of them does it still recognise afterwards? In the second question, 'ruined' means that the judge finds
# both objects of the prompt in none of eight images, and 'a bit worse' that it finds them in fewer images than before.

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
# Compare the number of pixels, cells and tokens. A cell of 16 numbers stands for 8 × 8 pixels of 3 numbers, so the
# amount of data shrinks by the factor
#
# $$\frac{3 \cdot 8^2}{16} = 12$$
#
# A token of FLUX is 2 × 2 cells, so it covers 16 × 16 pixels, and an image of $H \times W$ pixels has $N$ tokens and
# $N^2$ pairs of tokens:
#
# $$N = \frac{H}{16} \cdot \frac{W}{16}, \qquad N^2 = \Bigl( \frac{HW}{256} \Bigr)^2$$

# %%
for side in (128, 1024):
    pixels, cells, tokens = side**2, (side // 8) ** 2, (side // 16) ** 2
    print(f"{side:4} x {side}: {pixels:9,} pixels · {cells:6,} cells · {tokens:5,} tokens")
    print(f"{'':12} {3 * pixels:,} numbers become {16 * cells:,}, one in {3 * pixels // (16 * cells)}")
pair_ratio.against((128 * 128) ** 2 // 64**2)

# %% [markdown]
# The number of **tokens** is smaller than that of the pixels by a factor of 256, and the number of pairs that attention
# has to compare by a factor of $256^2 = 65{,}536$, which answers the first question.
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

# %% [markdown]
# The encoder's last layer has 32 channels: 16 means $\mu$ and 16 logarithms of variances $\sigma^2$. This is a
# *variational* autoencoder (arXiv 1312.6114), which was trained with noise of these variances added to the means:
#
# $$z = \mu + \sigma\, \varepsilon, \quad \varepsilon \sim \mathcal{N}(0, 1), \qquad
# L = \text{error}(D(z), x) + \beta \cdot \tfrac{1}{2} \bigl( \mu^2 + \sigma^2 - 1 - \log \sigma^2 \bigr)$$
#
# $D$ is the decoder. The last term is the Kullback-Leibler divergence of $\mathcal{N}(\mu, \sigma^2)$ from
# $\mathcal{N}(0, 1)$, averaged over all numbers. Without it the encoder could make $\sigma = 0$ and avoid the noise;
# with a large $\beta$ the latent would become pure noise. The miniature was trained with $\beta = 10^{-4}$
# (`training/autoencoder.py`). The noise has one useful effect: the decoder tolerates small errors in the latent, so
# small errors of the *flow* (the transformer, which learns to turn noise into latents) stay small in the image.

# %% exercise="latents.standardise"

# %%
print("scale and shift of the miniature:", autoencoder.config.scale_factor, autoencoder.config.shift_factor)
with fe.record("ae.encoder.moments") as rec:
    latent = autoencoder.encode(images)  # [16, 16, 16, 16]
moments = rec["ae.encoder.moments"].tensor.flatten(0, 1).to(device)  # [16, 32, 16, 16]
mean, logvar = moments.chunk(2, dim=1)
print(f"standard deviation of the means: {float(mean.std()):.1f} · of the latent: {float(latent.std()):.1f}")
print(f"the encoder's own noise, relative to that of the means: {float((logvar / 2).exp().mean() / mean.std()):.0%}")
if fe.passed("latents.standardise"):
    config = autoencoder.config
    yours = standardise(moments, config.scale_factor, config.shift_factor)
    course.compare("your latent and the library's", yours, latent)

# %% [markdown]
# This is what `scale` and `shift` are for. The KL term was too weak to give the means a standard deviation of 1. The
# flow mixes the latent with noise, which has mean 0 and standard deviation 1. For a latent of mean 0 and standard
# deviation $s$, the mixture at time $t$ has the variance
#
# $$\text{Var}\bigl[(1 - t)\, z + t\, \varepsilon\bigr] = (1 - t)^2 s^2 + t^2$$
#
# so at $t = 0.5$ image and noise have equal weight only if $s = 1$. Subtracting the mean and dividing by the standard
# deviation, both measured once over many images, does this:
#
# $$\text{latent} = \text{scale} \cdot (\mu - \text{shift}), \qquad
# \text{scale} = 1 / \text{std}(\mu), \quad \text{shift} = \text{mean}(\mu)$$
#
# (Over many images the latent's standard deviation is 1.0; that of a few images differs.) FLUX.1's two numbers, 0.3611
# and 0.1159, do the same for its own autoencoder, whose means have a standard deviation of about 1 / 0.3611 = 2.8.
# (Official code: `util.py` lines 326-327 and `modules/autoencoder.py` lines 308-315 of `black-forest-labs/flux` at
# commit 802fb47.)
#
# Next come the tokens. Write $z[k, y, x]$ for channel $k$ of the cell in row $y$ and column $x$ of a latent that is $w$
# cells wide. The tokens are numbered row by row, and number $4k + 2i + j$ of a token belongs to channel $k$ of its cell
# in row $i$ and column $j$ ($i$ and $j$ are 0 or 1):
#
# $$\text{token}\Bigl[\, r\, \tfrac{w}{2} + c,\;\; 4k + 2i + j \,\Bigr] = z[\, k,\; 2r + i,\; 2c + j \,]$$

# %% exercise="latents.pack"

# %% exercise="latents.unpack"

# %%
if fe.passed("latents.pack", "latents.unpack"):
    print("tokens:", list(pack(latent).shape))
    course.compare("your tokens and the library's", pack(latent), library.pack(latent))
    course.compare("the latent, packed and unpacked, and the latent", unpack(pack(latent), 16, 16), latent)

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
# the few directions in this space along which the latents vary most (their principal components), and decode. We
# measure the error as *PSNR*, the peak signal-to-noise ratio, in decibels. With pixels from 0 to 255 and the mean
# squared error MSE,
#
# $$\text{PSNR} = 10\, \log_{10} \frac{255^2}{\text{MSE}} = 20\, \log_{10} \frac{255}{\sqrt{\text{MSE}}}$$
#
# so 20 dB is an error of a tenth of the range from black to white, and 40 dB a hundredth. All values are means over
# sixteen images.

# %%
flat = latent.permute(0, 2, 3, 1).reshape(-1, 16)  # [cells, 16]
centre = flat.mean(0)
directions = torch.linalg.svd(flat - centre, full_matrices=False)[2]  # [16, 16], in order of variance
counts, quality = (1, 2, 3, 4, 6, 8, 12, 16), []
for count in counts:
    projection = directions[:count].T @ directions[:count]
    projected = (flat - centre) @ projection + centre  # [cells, 16]
    quality.append(psnr(images, autoencoder.decode(projected.reshape(-1, 16, 16, 16).permute(0, 3, 1, 2))))
thumbnails = {  # the same images, downscaled and upscaled again
    side: psnr(images, F.interpolate(F.avg_pool2d(images, 128 // side), size=128, mode="bilinear")) for side in (16, 32)
}

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(counts, quality, "o-", color="#0072B2", label="latent, 256 numbers per direction")
for (side, value), style in zip(thumbnails.items(), (":", "--")):
    ax.axhline(value, color="#D55E00", linestyle=style, label=f"{side} x {side} thumbnail, {3 * side * side:,} numbers")
ax.set_xlabel("number of directions kept, of 16")
ax.set_ylabel("PSNR in dB")
ax.set_title(f"Keeping only six of 16 directions costs {quality[-1] - quality[4]:.1f} dB")
ax.legend()
plt.show()
for count, value in zip(counts, quality):
    print(f"{count:2} directions, {256 * count:5,} numbers: {value:.0f} dB")
for side, value in thumbnails.items():
    print(f"{side} x {side} thumbnail, {3 * side * side:5,} numbers: {value:.0f} dB")

# %% [markdown]
# At how many directions does the latent beat a thumbnail that needs as many numbers? The miniature's images are simple,
# so the last directions are hardly used; photographs need more. Earlier
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
for pixels, value in zip(width, error_share):
    print(f"stripes of {float(pixels):4.1f} pixels: the error is {value:.0%} of the power")

# %% [markdown]
# How far does the influence of one cell reach? Change all 16 numbers of one cell, in each of the sixteen images, and
# see where the image changes:

# %%
edited = latent.clone()
edited[:, :, 8, 8] += 2
change = (autoencoder.decode(edited) - reconstruction).square().sum(1)  # [16, 128, 128]
for name, m in {"the cell's own 8 x 8 pixels": 0, "these and the eight cells around them": 8}.items():
    share = change[:, 64 - m : 72 + m, 64 - m : 72 + m].sum((1, 2)) / change.sum((1, 2))  # [16]
    print(f"{name}: {share.median():.0%} of the change ({share.min():.0%} to {share.max():.0%})")

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
if fe.passed("latents.Downsample", "latents.pack"):
    with fe.swap("ae.encoder.*.downsample", lambda old: Downsample(old.conv.in_channels), autoencoder):
        yours = autoencoder.encode(images)
    course.compare("the latent of the encoder with your layers and without", yours, latent, within=1e-4)

    state = {}

    def remember(x, ctx):
        state["latent"] = x
        return x

    with fe.intervene("sample.x", remember):
        with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(pack(state["latent"]))):
            out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent made from your tokens and the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# **Another order inside the token.** Each token contains the right 64 numbers, but in another order: now the channel
# changes fastest. A wrong `view` or `transpose` easily produces this order by accident. The judge counts, for eight
# seeds, the images that show the two objects of the prompt and nothing else.

# %%
state = {}


def remember(x, ctx):
    state["latent"] = x
    return x


def pack_channel_fastest(x):
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, 2, 2, C]
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def count_right(images) -> int:
    """In how many images the judge finds a red circle and a blue square, and nothing else."""
    found = [sorted((thing.color, thing.form) for thing in detect(image).objects) for image in images]
    return found.count([("blue", "square"), ("red", "circle")])


runs = {"seed": list(range(8)), "steps": 8, "trajectory": False, "progress": False}
right_order = pipe(prompt, **runs)
with fe.intervene("sample.x", remember):
    with fe.intervene("img_in", lambda tokens, ctx: pipe.flux.img_in(pack_channel_fastest(state["latent"]))):
        reordered = pipe(prompt, **runs)
before, after = count_right(right_order.images), count_right(reordered.images)
print(f"images with both objects: {before} of 8 with the right order, {after} of 8 with the other one")
reorder_effect.against("ruined" if after == 0 else "a bit worse" if after < before else "the same")

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
print(
    f"right: {psnr_right:.0f} dB, padding on the other side: {psnr_padding:.0f} dB, no scaling: {psnr_unscaled:.0f} dB"
)

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
x, decibel = images[:8], []
for _ in range(10):  # encode and decode
    x = autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)
    decibel.append(psnr(images[:8], x))
round_trips.against("worse" if decibel[-1] < decibel[0] - 1 else "no worse")
print(f"after one round trip {decibel[0]:.0f} dB, after ten {decibel[-1]:.0f} dB (means over {len(x)} images)")

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
# **Questions people ask**: *Does encoding draw a random sample?* The official code takes the mean (`AutoEncoder` has
# `sample_z=False`, `modules/autoencoder.py` line 283), diffusers samples (`retrieve_latents` in
# `pipeline_flux_img2img.py`, version 0.42.1); the noise is a few percent of the standard deviation, as you measured
# above. *Why does my 1000-pixel image come out with another size?* A side must be a whole number of tokens of 16
# pixels. The official code rounds up, to 126 cells of 8 pixels (`get_noise`, `sampling.py` lines 29-30); diffusers
# rounds down, to 124 (`FluxPipeline.prepare_latents`, 0.42.1). *Why does memory run out at large sizes?* The
# number of tokens grows with the area, and the number of pairs with its square: twice the side means 16 times the
# pairs.
#
# **Read**: Latent Diffusion, arXiv 2112.10752 · Scaling Rectified Flow Transformers, arXiv 2403.03206 (why 16
# channels) · `black-forest-labs/flux`, `modules/autoencoder.py` and `sampling.py` · ours:
# `fluxedu/models/autoencoder.py`, `fluxedu/sampling/latents.py`.

# %%
fe.score()
