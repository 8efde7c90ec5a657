# %% [markdown]
# # 01 · Latents: the autoencoder
#
# **Why not pixels?** FLUX never sees a pixel. An *autoencoder* (an encoder and a decoder network) turns every 8 × 8
# pixels into one *cell* of 16 numbers; the grid of cells is the image's *latent*. The transformer works on the latent,
# and the decoder turns the result back into pixels.
#
# Afterwards you can say how many tokens an image needs, train a variational autoencoder and say what the
# Kullback-Leibler term does to its latents, explain the two numbers 0.3611 and 0.1159, and predict which details
# are lost.
#
# 60 minutes · needs notebooks 00 and 00b

# %%
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.nano.exam import psnr
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import Scene, SceneObject, render, scenes, to_tensor
from fluxedu.sampling.images import to_images

device = course.begin()
pipe = fe.load(device=device)
autoencoder = deepcopy(pipe.autoencoder).float()  # a float32 copy to measure with, whatever the pipeline's dtype

test_scenes = [scene for scene, _ in zip(scenes(1, size=(128, 128), held_out=True), range(16))]
images = to_tensor(np.stack([render(scene) for scene in test_scenes])).to(device)  # [16, 3, 128, 128] in [-1, 1]
course.where(pipe, "encoder", "image")

# %% [markdown]
# The filled boxes are this notebook's parts; the colour shows their kind: text purple, time orange, transformer blue,
# image green. The encoder is needed only when a run starts from an image, the decoder once at the end of every run.
#
# ## Predict
#
# For the second question we train a tiny autoencoder on images of one red circle; the *Kullback-Leibler term*
# of its loss pulls the distribution of each latent towards $\mathcal{N}(0, 1)$. For the third we draw red stars of
# five sizes, then encode and decode the images. The *judge*, a small program of this course that finds shapes and
# colours in an image by geometry, without a network, recognises all five stars before that.

# %%
pair_ratio = fe.predict(
    "With one token per pixel at 128 x 128, how many times as many pairs are there as with 64 tokens?", 65536
)  # answer
strong_kl = fe.predict(
    "If a strong loss pulls latents to N(0, 1), do decoded samples of N(0, 1) look 'different' or 'alike'?", "alike"
)  # answer
smallest_star = fe.predict(
    "What is the radius of the smallest star that the judge still recognises, of 24, 16, 12, 8 and 6 pixels?", 12
)  # answer
round_trips = fe.predict(
    "An image is encoded and decoded ten times instead of once. Is the result 'no worse' or 'worse'?", "worse"
)  # answer

# %% [markdown]
# ## Why not pixels?
#
# Attention compares every token with every token, so its cost grows with the number of *pairs* of tokens. Compare the
# number of pixels, cells and tokens. A cell of 16 numbers stands for 8 × 8 pixels of 3 numbers, so the amount of data
# shrinks by the factor
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
pair_ratio.against((128 * 128) ** 2 // 64**2)

# %% [markdown]
# There are 256 times fewer tokens than pixels, and $256^2 = 65{,}536$ times fewer pairs.

# %% [markdown]
# ## Build it
#
# The grid of cells is 8 times smaller than the image per side: the encoder halves the grid three times. `fe.record`
# stores the values that pass through named points of the model, called *sites* (notebook 00b). These are the channels,
# rows and columns at each level:

# %%
with fe.record("ae.encoder.down.*.out", "ae.encoder.moments", "ae.latent") as rec, torch.no_grad():
    latent = autoencoder.encode(images)  # [16, 16, 16, 16]
for name in rec.keys():
    print(f"{name:20} {list(rec[name].tensor.shape[-3:])}")

# %% [markdown]
# The fourth level does not halve the grid. Each halving is one convolution with stride 2, and its padding is easy to
# get wrong.

# %% exercise="latents.Downsample"

# %% [markdown]
# ## A variational autoencoder
#
# The encoder's last layer has 32 channels: 16 means $\mu$ and 16 logarithms of variances $\sigma^2$. This is a
# *variational* autoencoder (VAE, arXiv 1312.6114): in training, noise of these variances is added to the means before
# $D$, the decoder, gets them.
#
# $$z = \mu + \sigma\, \varepsilon, \quad \varepsilon \sim \mathcal{N}(0, 1), \qquad
# L = \text{error}(D(z), x) + \beta \cdot \text{KL}$$
#
# KL is the Kullback-Leibler divergence of $\mathcal{N}(\mu, \sigma^2)$ from $\mathcal{N}(0, 1)$, the expectation of
# the logarithm of the ratio of the two densities. With $z = \mu + \sigma \varepsilon$,
#
# $$\text{KL} = \mathbb{E}\Bigl[ \tfrac{z^2}{2} - \tfrac{\varepsilon^2}{2} - \log \sigma \Bigr]
# = \tfrac{1}{2} \bigl( \mu^2 + \sigma^2 - 1 - \log \sigma^2 \bigr)$$
#
# because $\mathbb{E}[z^2] = \mu^2 + \sigma^2$ and $\mathbb{E}[\varepsilon^2] = 1$.

# %% exercise="latents.kl"

# %% exercise="latents.vae_loss"

# %% [markdown]
# Now train with your loss. The images show a red circle on white; only its two coordinates differ, so a latent of two
# numbers is enough, and we can draw it. We train with three values of $\beta$, and with three seeds each.

# %%
position = np.random.default_rng(0).uniform(8, 24, (512, 2))  # of the circles
drawn = [render(Scene("white", (SceneObject("circle", "red", "small", x, y, 6.0),), 32, 32)) for x, y in position]
circles = F.avg_pool2d(to_tensor(np.stack(drawn)), 2).flatten(1)  # [512, 768]: 3 colours, 16 x 16 pixels
BETAS = (0.0, 0.003, 0.3)


@torch.enable_grad()  # a later cell turns gradients off
def train(beta: float, seed: int, steps: int = 500) -> tuple[nn.Module, nn.Module]:
    """A VAE of five linear layers, trained with your loss for about a second: encoder and decoder."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(768, 64), nn.SiLU(), nn.Linear(64, 4))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 768))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=5e-3)
    for _ in range(steps):
        batch = circles[torch.randint(len(circles), (32,))]
        loss = vae_loss(encoder, decoder, batch, torch.randn(32, 2), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False), decoder.requires_grad_(False)


if fe.passed("latents.vae_loss"):
    trained = {(beta, seed): train(beta, seed) for beta in BETAS for seed in range(3)}
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    print("Ranges are over three seeds. Variety: standard deviation of 500 decoded samples / that of the real images")
    for beta in BETAS:
        of_beta = [trained[beta, seed] for seed in range(3)]
        gaussians = [encoder(circles).chunk(2, dim=1) for encoder, _ in of_beta]
        spread = [float(mu.std()) for mu, _ in gaussians]
        sigma = [float((log / 2).exp().mean()) for _, log in gaussians]
        variety = [float(decoder(noise).std(0).mean() / circles.std(0).mean()) for _, decoder in of_beta]
        print(
            f"beta {beta:5}: standard deviation of the means {min(spread):.0f} to {max(spread):.0f} · sigma "
            f"{max(sigma):.1f} · variety of the decoded images {min(variety):.0f} to {max(variety):.0f}"
        )
    strong_kl.against("alike" if max(variety) < 0.5 else "different")

    fig, axes = plt.subplots(2, 3, figsize=(8, 5.6), layout="constrained")
    grid = torch.cartesian_prod(torch.linspace(-2, 2, 7), torch.linspace(-2, 2, 7))  # [49, 2]
    for column, beta in enumerate(BETAS):
        encoder, decoder = trained[beta, 1]
        axes[0, column].scatter(*encoder(circles)[:, :2].T, c=position[:, 0], s=6, cmap="cividis")
        axes[0, column].scatter(*noise[:200].T, s=2, color="#D55E00")
        axes[0, column].set_title(f"beta = {beta}")
        axes[0, column].set_aspect("equal", "datalim")
        tiles = decoder(grid).reshape(7, 7, 3, 16, 16).flip(1).permute(1, 3, 0, 4, 2).reshape(112, 112, 3)
        axes[1, column].imshow(((tiles + 1) / 2).clamp(0, 1), extent=(-2.3, 2.3, -2.3, 2.3))
    fig.suptitle(
        "Top: latents of the images, coloured by the circle's x; orange: N(0, 1). Bottom: decoded latents.\n"
        "Without KL the two differ; with a weak KL they agree; with a strong KL nothing is left of the image",
        fontsize=10,
    )
    plt.show()

# %% [markdown]
# Without the KL term, $\sigma$ becomes 0, and the latents lie wherever the encoder has put them: many samples of
# $\mathcal{N}(0, 1)$ lie where there is no image, and what they are decoded into is no circle. With the weak term, the
# latents fill about the same region as $\mathcal{N}(0, 1)$, and neighbouring latents show neighbouring positions. With
# the strong term, the encoder outputs $\mu = 0$ and $\sigma = 1$ for every image, and the decoder can only show their
# average. This is called *posterior collapse*.
#
# The miniature was trained with $\beta = 10^{-4}$ (`training/autoencoder.py`), too weak to turn the latents into
# $\mathcal{N}(0, 1)$. So a second model, the *flow* (the transformer), learns to turn noise into such latents. The
# noise in the VAE's training is still useful: it makes the decoder tolerate small errors of the flow.
#
# Encoding an image for the flow needs the means only, and two numbers.

# %% exercise="latents.standardise"

# %%
with fe.record("ae.encoder.moments") as rec, torch.no_grad():
    latent = autoencoder.encode(images)
moments = rec["ae.encoder.moments"].tensor.flatten(0, 1).to(device)  # [16, 32, 16, 16]
mean, logvar = moments.chunk(2, dim=1)
config = autoencoder.config
print("scale and shift of the miniature:", config.scale_factor, config.shift_factor)
print(f"standard deviation of the means: {float(mean.std()):.1f} · of the latent: {float(latent.std()):.1f}")
print(f"the encoder's own noise, relative to that of the means: {float((logvar / 2).exp().mean() / mean.std()):.0%}")
if fe.passed("latents.standardise"):
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

# %% [markdown]
# ## See it
#
# Are all 16 channels needed? The 16 numbers of a cell are a point in a space of 16 dimensions. Keep only
# the few directions in this space along which the latents vary most (their principal components), and decode. We
# measure the error as *PSNR*, the peak signal-to-noise ratio, in decibels. With pixels from 0 to 255 and the mean
# squared error MSE,
#
# $$\text{PSNR} = 10\, \log_{10} \frac{255^2}{\text{MSE}} = 20\, \log_{10} \frac{255}{\sqrt{\text{MSE}}}$$
#
# so 20 dB is an error of a tenth of the range from black to white, and 40 dB one of a hundredth of it. All values are
# means over sixteen images.

# %%
_ = torch.set_grad_enabled(False)  # nothing is trained from here on
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
ax.set(xlabel="number of directions kept, of 16", ylabel="PSNR in dB")
ax.set_title(f"With only six of 16 directions the PSNR is {quality[-1] - quality[4]:.1f} dB lower")
ax.legend()
plt.show()
for count, value in zip(counts, quality):
    print(f"{count:2} directions, {256 * count:5,} numbers: {value:.0f} dB")
for side, value in thumbnails.items():
    print(f"{side} x {side} thumbnail, {3 * side * side:5,} numbers: {value:.0f} dB")

# %% [markdown]
# At how many directions does the latent beat the 16 × 16 thumbnail, with as many numbers or fewer? The miniature's
# images are simple, so the last directions are hardly used; photographs need more. Earlier latent diffusion models had
# 4 channels, FLUX has 16.
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
ax.set(xlabel="width of the stripes: pixels from one to the next", ylabel="error, % of the power", ylim=(0, 100))
ax.set_title(
    f"Error: {error_share[0]:.0%} of the power for the widest stripes, {error_share[-1]:.0%} for the narrowest"
)
plt.show()

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules of the model by yours and copies the trained weights into them; here it replaces the
# encoder's three downsampling layers. Does the trained encoder still produce the same latent?

# %%
if fe.passed("latents.Downsample"):
    with fe.swap("ae.encoder.*.downsample", lambda old: Downsample(old.conv.in_channels), autoencoder):
        yours = autoencoder.encode(images)
    course.compare("the latent of the encoder with your layers and without", yours, latent, within=1e-4)

# %% [markdown]
# ## Break it
#
# **Padding on the other side**: `padding=1` pads all four sides, but with stride 2 on an even grid the zeros below and
# on the right are never read, so every window starts one pixel further up and left. **No scaling**: the encoder's means
# go to the decoder without scale and shift. Neither raises an error.


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
versions = {
    "an original": images,
    "encoded and decoded": reconstruction,
    "padded left and above": wrong_padding,
    "not scaled": unscaled,
}
decibel = {name: psnr(images, x) for name, x in list(versions.items())[1:]}
print(" · ".join(f"{name}: {value:.0f} dB" for name, value in decibel.items()))

fig, axes = plt.subplots(1, 4, figsize=(8, 2.4), layout="constrained")
for ax, (name, x) in zip(axes, versions.items()):
    ax.imshow(to_images(x[:1])[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Wrong padding, no scaling: neither raises an error, both damage the image", fontsize=10)
plt.show()

# %% [markdown]
# The missing scale is the most dangerous mistake, because the result still looks like an image, only with too much
# contrast.
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
radii_lost = "radius " + " and ".join(str(r) for r in radii if r < smallest)
fig.suptitle(f"Top: original. Bottom: encoded and decoded. At {radii_lost}, stars lose their points")
plt.show()

# %% [markdown]
# A star of radius 8 fits into a square of two by two cells, with all of its five points. However good the transformer
# is, the latents that it learns from decode to images without these details. The same holds for small faces and small
# letters in large models. It helps to generate a larger image, in which the same object covers more cells.
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
# 3. The KL term keeps the latents of a VAE together; too much of it destroys the information in them.
# 4. Scale and shift give the latent the mean and standard deviation of the noise that it is mixed with.
# 5. Detail finer than a few pixels is lost in the round trip: the latents from which the transformer learns decode to
#    images without it.
#
# **Questions people ask**: *Does encoding draw a random sample?* The official code takes the mean (`AutoEncoder` has
# `sample_z=False`, `modules/autoencoder.py` line 283), diffusers samples (`retrieve_latents` in
# `pipeline_flux_img2img.py`, version 0.42.1); in the miniature, the noise is a few percent of the standard deviation,
# as you measured above. *Why does memory run out at large sizes?* Activations and the decoder grow with the area. The
# pairs of tokens (16 times as many for twice the side) cost time, and memory only where the attention map is stored.
# The weights of FLUX.1's transformer alone are 24 GB in bfloat16.
#
# **Read**: Auto-Encoding Variational Bayes, arXiv 1312.6114 · Latent Diffusion, arXiv 2112.10752 · Scaling Rectified
# Flow Transformers, arXiv 2403.03206 (why 16 channels) · `black-forest-labs/flux`, `modules/autoencoder.py` · ours:
# `fluxedu/models/autoencoder.py`. Next: notebook 01b, in which the latent becomes tokens.

# %%
fe.score()
