# %% [markdown]
# # 14 · The family
#
# **What is the difference between schnell, dev, fill, canny, depth, redux and kontext?** Less than the names suggest:
# they share one architecture. Some have more numbers per token, others have more tokens, and they take different
# numbers of steps. You will build what each variant adds and see all of them at work: we have trained the whole family
# in miniature.
#
# Afterwards you can read a variant off its config, invert an image to noise and edit it, merge a LoRA that you have
# fitted yourself, and compare models blind, with ratings that you can compute and question.
#
# 130 minutes, in two sittings: stop before “Image-to-image” · needs notebooks 04, 11 and 12

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.checkpoints.lora import merge
from fluxedu.loading import WEIGHTS
from fluxedu.models import VARIANTS, Flux, FluxConfig, ReduxHead
from fluxedu.models.meta_init import meta_init
from fluxedu.nano.exam import masked_psnr
from fluxedu.nano.exam import questions as exam_prompts
from fluxedu.nano.judge import detect, judge, quality
from fluxedu.nano.scenes import Scene, SceneObject, depth_map, edge_map, object_map, render
from fluxedu.sampling.images import to_images, to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.solvers import schedule
from fluxedu.widgets.blind import blind, pairs_of, ratings

device = course.begin()
pipe = fe.load("nano", device=device)
course.where(pipe, "in", "vec", "solver")

# %% [markdown]
# The variants differ only in the three highlighted parts: in the input tokens, in what is added to `vec` (the vector
# that the modulation is computed from, notebook 05), and in how the sampler takes its steps. The blocks have the same
# architecture in all of them. (This page loads the miniature's family by name, since its members belong together; the
# official models are `fe.load("schnell")`, `fe.load("fill")` and so on.)
#
# ## Predict
#
# A *LoRA* is a small file with an update of a model's weights, stored as pairs of thin matrices. To *invert* an image
# means to find noise from which the sampler generates it; for an edit, sampling starts from this noise with another
# prompt. The *judge* is a program that finds shapes and colours in an image by geometry.

# %%
fill_inputs = fe.predict("How many numbers per image token does fill read (noise, masked image, mask)?", 384)  # answer
lora_share = fe.predict(
    "How large is canny's LoRA of rank 128, as a percentage of the model's parameters?", 5.2
)  # answer
higher_scale = fe.predict(
    "An image is inverted and edited with guidance scale 6 instead of 1. Is the edit better or worse?", "worse"
)  # answer
eight_steps = fe.predict(
    "In what percentage of four pairs does the judge prefer 8 steps to 4? (A tie counts as half.)", 88
)  # answer

# %% [markdown]
# ## The table
#
# Each variant is a few numbers in `fluxedu/models/config.py`. The networks below are created on PyTorch's *meta*
# device: their tensors have shapes but no data, so that twelve billion parameters can be counted on a laptop.


# %%
def count_parameters(network):
    """The number of parameters of a network."""
    return sum(p.numel() for p in network.parameters())


print("variant      parameters      in  guidance input  steps  guidance  txt_len  shift")
for name, variant in VARIANTS.items():
    with meta_init():
        size = count_parameters(Flux(variant.flux))
    defaults = variant.sampling
    guidance_input, shift = ("yes" if flag else "no" for flag in (variant.flux.guidance_embed, defaults.shift))
    row = f"{name:11} {size:14,} {variant.flux.in_channels:6} {guidance_input:>15} {defaults.steps:6}"
    print(f"{row} {defaults.guidance:9g} {defaults.text_length:8}  {shift:>5}")
with meta_init():
    print(f"redux head  {count_parameters(ReduxHead()):14,}")
fill_inputs.against(VARIANTS["fill"].flux.in_channels)

# %% [markdown]
# Read the table line by line. **schnell** has no guidance input, 10,229,760 parameters fewer than dev, and takes four
# steps; the training that made this possible does not show in the architecture. **fill**, **canny** and **depth** are
# dev with a wider first layer: more numbers in each token. **kontext** and **redux** are dev with more *tokens*: a
# second image after the first, or 729 image tokens after the text. **krea** is dev, trained differently.
#
# ## More numbers per token: fill
#
# fill repaints a region of an image. The masked image and the mask have the same layout as the image itself, so each
# image token gets its part of them as additional numbers. The mask is not reduced to the size of the latent: all of its
# pixels are kept, rearranged into channels. A cell of the latent covers 8 × 8 pixels of the mask, which become 64
# channels, and a token is 2 × 2 cells:
#
# $$\underbrace{16 \cdot 2 \cdot 2}_{\text{noise}} + \underbrace{16 \cdot 2 \cdot 2}_{\text{masked image}}
# + \underbrace{8 \cdot 8 \cdot 2 \cdot 2}_{\text{mask}} = 64 + 64 + 256 = 384$$
#
# In the official code this is `prepare_fill`, `sampling.py` lines 107-157 of `black-forest-labs/flux` at commit
# 802fb47; `denoise` there appends these numbers to each token in every step (lines 331-332).

# %% exercise="family.fill"

# %%
if fe.passed("family.fill"):
    network = Flux(
        FluxConfig(
            in_channels=384,
            hidden_size=64,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=(4, 14, 14),
            context_in_dim=8,
            vec_in_dim=8,
        )
    )
    text, pooled, one = torch.randn(1, 5, 8), torch.randn(1, 8), torch.ones(1)
    tokens = fill_tokens(torch.randn(1, 16, 4, 6), torch.randn(1, 16, 4, 6), torch.ones(1, 1, 32, 48))
    with torch.no_grad():
        v = network(tokens, image_ids(4, 6), text, text_ids(5), one, pooled, one)
    print("input tokens:", tuple(tokens.shape), "· velocity:", tuple(v.shape))

# %% [markdown]
# The network reads 384 numbers per token and predicts 64: masked image and mask are inputs, and never predicted.
# **canny** and **depth** are simpler: they read a second latent, of the edges or of the depth map, 64 + 64 = 128
# numbers.
#
# ## More tokens: kontext
#
# kontext edits an image, the *reference image*, according to an instruction. The tokens of the reference image come
# after those of the image to be generated, the *target*. Their position ids (notebook 04) have 1 in the frame
# coordinate, which is 0 for all other tokens. The network predicts a velocity for all tokens; that of the reference
# tokens is discarded. (Official code, same commit: `sampling.py`, `prepare_kontext` line 251 sets the frame, `denoise`
# line 349 keeps the target's velocity.)

# %% exercise="family.reference"

# %%
objects = SceneObject("circle", "red", "large", 40, 45, 24), SceneObject("square", "blue", "large", 90, 85, 23)
scene = Scene("white", objects, 128, 128, 3)
photo = render(scene)  # uint8 [128, 128, 3], drawn by a program and not by a network
with torch.no_grad():
    clean = pipe.autoencoder.encode(to_tensor(photo).to(device))  # [1, 16, 16, 16]
text = pipe.prompt_encoder(["a green circle left of a blue square on a white background"] * 8)
noise = pack(torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0))).to(device)  # [8, 64, 64]
target_ids, txt_ids = image_ids(16, 16).to(device), text_ids(32).to(device)  # [64, 3], [32, 3]
time, guidance = torch.ones(8, device=device), torch.full((8,), 6.0, device=device)


def velocity_of_target(tokens, ids):
    """The miniature's velocity for the first 64 tokens, at t = 1."""
    with torch.no_grad():
        v = pipe.flux(tokens, ids, text.txt, txt_ids, time, text.pooled, guidance)
    return v[:, :64]


def changes_in_percent(v):
    """By how much velocities [8, 64, 64] differ from those without the change."""
    change = 100 * (v - v_alone).flatten(1).norm(dim=1) / v_alone.flatten(1).norm(dim=1)
    return f"{change.median():.0f} % ({change.min():.0f} to {change.max():.0f})"


v_alone = velocity_of_target(noise, target_ids)
tokens = torch.cat([noise, pack(clean).expand(8, -1, -1)], dim=1)  # [8, 64 + 64, 64]
for frame in (0, 1):
    reference = target_ids + torch.tensor([frame, 0, 0], device=device)
    v = velocity_of_target(tokens, torch.cat([target_ids, reference]))
    print(f"a reference image in frame {frame} changes the velocity of eight noises by {changes_in_percent(v)}")

# %% [markdown]
# The code accepts the second image without a change, and the output changes. But this network was never trained with
# two frames, so we cannot expect the change to be an edit. The architecture needed nothing new for kontext; its
# abilities come from training alone. `nano-kontext` is this network, trained further on pairs of images before and
# after an edit (its model card says for how long). You will use it below.
#
# ## More tokens: redux
#
# The prompt of redux is an image. A vision encoder (SigLIP) turns the image into 729 feature vectors, a head of two
# layers maps them to the width of T5's tokens, and from there on they are treated as text tokens. (Official code, same
# commit: `ReduxImageEncoder` in `modules/image_embedders.py` lines 64-99, and `prepare_redux` in `sampling.py`, whose
# line 192 appends the tokens to T5's.)

# %% exercise="family.redux"

# %%
if fe.passed("family.redux"):
    other = pipe.prompt_encoder(["a yellow star above a purple ring"] * 8).txt  # in place of an image's tokens

    def velocity_with(image_tokens):
        """The miniature's velocity for the text followed by these tokens."""
        tokens, ids = with_image_tokens(text.txt, image_tokens)
        with torch.no_grad():
            return pipe.flux(noise, target_ids, tokens, ids.to(device), time, text.pooled, guidance)

    shuffled = other[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    print(f"32 more tokens change the velocity of eight noises by {changes_in_percent(velocity_with(other))}")
    course.compare("the new tokens in another order and in theirs", velocity_with(shuffled), velocity_with(other), 1e-4)

# %% [markdown]
# All of these tokens have the position id (0, 0, 0), so the network does not know their order. Where something was in
# the image must be contained in the tokens themselves.
#
# ## All variants at work
#
# One image, five variants. Each is the miniature, trained further with its own input; canny and depth are published as
# LoRAs, like the official ones. Their control images here are drawn from the scene.
# `fluxedu.sampling.images.edges(photo)` finds the edges of any image, as the official code does. This is one image and
# one seed per variant, to show what goes in and what comes out; how often each does what it should, measured on 110 to
# 500 scenes, is in `fluxedu/nano/weights/README.md`.

# %%
hole = np.zeros((128, 128))
hole[54:124, 65:126] = 1  # around the square
examples = {  # variant: (the input image to show, the prompt, the pipeline's arguments)
    "fill": (
        np.where(hole[..., None] > 0, 128, photo).astype(np.uint8),
        "a red circle left of a yellow star",
        {"image": photo, "mask": hole},
    ),
    "canny": (edge_map(scene), "a pink circle and a green square on a black background", {"control": edge_map(scene)}),
    "depth": (depth_map(scene), "a cyan circle left of an orange square", {"control": depth_map(scene)}),
    "kontext": (photo, "make the circle green", {"reference": photo}),
    "redux": (photo, "", {"image_prompt": photo}),
}


def found_in(image):
    """The objects that the judge finds in an image."""
    return ", ".join(f"{found.color} {found.form}" for found in detect(image).objects) or "nothing"


fig, axes = plt.subplots(2, 5, figsize=(9, 4.2), layout="constrained")
for (above, below), (name, (input_image, prompt, arguments)) in zip(axes.T, examples.items()):
    variant = fe.load(f"nano-{name}", device=device)
    out = variant(prompt, seed=1, trajectory=False, progress=False, **arguments)
    print(f"{name:8} “{prompt}”: the judge finds", found_in(out.images[0]))
    above.imshow(input_image)
    below.imshow(out.images[0])
    above.set_title(name, fontsize=9)
    above.axis("off")
    below.axis("off")
fig.suptitle("Input image (above) and result (below): canny and depth keep positions, redux keeps objects")
plt.show()

# %% [markdown]
# Look at what each variant keeps of its input. fill keeps every pixel outside the masked region, because the pipeline
# pastes the original pixels back (`paste=False` shows what the network itself returns there). canny and depth keep
# the *positions* and take the colours from the prompt. kontext keeps nearly everything that the instruction does not
# mention (look at its square). redux keeps *which* objects there are, not where they are: its tokens have no positions,
# and its head learned to describe an image in tokens that the flow already understood.
#
# ## Few steps
#
# We compare four ways to generate images for the same prompts: the miniature with embedded guidance in 8, 4 and 2
# steps, and the base model with classifier-free guidance in 8 steps, which needs 16 evaluations of the network
# (notebook 12). The prompts are those of the miniature's exam, which it has not seen in training; `claim` lists what a
# correct image must show.

# %%
base = fe.load("nano-base", device=device)
test_prompts = [q for q in exam_prompts(60) if q.size == (128, 128)][:4]
models = {
    "nano, 8 steps": (pipe, 8),
    "nano-base, 8 steps": (base, 8),
    "nano, 4 steps": (pipe, 4),
    "nano, 2 steps": (pipe, 2),
}
images_of = {
    name: [model(q.prompt, seed=q.seed, steps=n, trajectory=False, progress=False).images[0] for q in test_prompts]
    for name, (model, n) in models.items()
}
fig, axes = plt.subplots(4, 4, figsize=(6.4, 6.6), layout="constrained")
for row, (name, images) in zip(axes, images_of.items()):
    for ax, image in zip(row, images):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
fig.suptitle("Four prompts: clear shapes in 8 steps, poor ones in 4, hardly any in 2")
plt.show()

# %% [markdown]
# schnell needs only one to four steps because it was trained for them, by adversarial distillation (arXiv 2403.12015);
# without that training the same network needs more. `nano-schnell` is the miniature after further training by a simpler
# method, progressive distillation (arXiv 2202.00512). The miniature, the *teacher*, samples in 20 steps, and its states
# $x_0, \dots, x_4$ at the five times $t_0 = 1 > t_1 > \dots > t_4 = 0$ are stored. The student learns the constant
# velocity that leads from each of them to the next in a single Euler step (`schnell_loss` in `training/schnell.py`):
#
# $$L = \Bigl\| v_\theta(x_k, t_k) - \frac{x_{k+1} - x_k}{t_{k+1} - t_k} \Bigr\|^2$$
#
# So it learns chords of the teacher's curved path (notebook 10), where the teacher has learned tangents. We test both
# with twenty prompts and four steps:

# %%
schnell = fe.load("nano-schnell", device=device)
twenty_prompts = [q for q in exam_prompts(160) if q.size == (128, 128)][:20]
in_four_steps, right = {}, {}
for name, model in {"nano": pipe, "nano-schnell": schnell}.items():
    prompts, seeds = [q.prompt for q in twenty_prompts], [q.seed for q in twenty_prompts]
    out = model(prompts, seed=seeds, steps=4, trajectory=False, progress=False)
    in_four_steps[name] = out.images
    right[name] = sum(judge(image, q.claim).everything for image, q in zip(out.images, twenty_prompts))
    print(f"{name}, 4 steps: {right[name]} of {len(twenty_prompts)} images entirely right")
fewer = count_parameters(pipe.flux) - count_parameters(schnell.flux)
print(f"nano-schnell has {fewer:,} parameters fewer: it has no guidance input")
fig, axes = plt.subplots(2, 6, figsize=(8.4, 3.2), layout="constrained")
for row, (name, images) in zip(axes, in_four_steps.items()):
    for ax, image in zip(row, images):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
fig.suptitle(
    f"Four steps: {right['nano']} of {len(twenty_prompts)} images are right without training for them (above), "
    f"{right['nano-schnell']} with it (below)",
    fontsize=10,
)
plt.show()

# %% [markdown]
# ## Compare and rate
#
# The announcement of FLUX.1 opens with Elo ratings. They come from pairs: people see two images of the same prompt and
# say which is better. Each comparison changes two ratings, according to how surprising its result is. With ratings $a$
# and $b$ and a score $s$ of 1, 0 or ½ for a,
#
# $$p_a = \frac{1}{1 + 10^{(b - a)/400}}, \qquad a' = a + k\,(s - p_a), \qquad b' = b - k\,(s - p_a)$$

# %% exercise="family.elo"

# %% [markdown]
# Here the judge replaces the people. The image that satisfies more claims of the prompt wins. If both satisfy equally
# many, the one that is drawn more cleanly wins, provided that the difference is clear. Otherwise it is a tie.


# %%
def score_of(image, claim):
    """The number of claims that hold minus the number of extra objects; and how cleanly the image is drawn."""
    verdict = judge(image, claim)
    claims = [verdict.background, *verdict.colors, *verdict.forms, *verdict.sizes, *verdict.relations]
    return sum(ok is True for ok in claims) - verdict.extra, quality(image, verdict.detections)


scores = {
    name: [score_of(image, q.claim) for image, q in zip(images, test_prompts)] for name, images in images_of.items()
}


def preferred(prompt, left, right):
    """1.0: left, 0.0: right, 0.5: a tie."""
    (a, clean_a), (b, clean_b) = scores[left][prompt], scores[right][prompt]
    if a != b:
        return float(a > b)
    return 0.5 if abs(clean_a - clean_b) < 0.03 else float(clean_a > clean_b)


games = [(p, a, b, preferred(p, a, b)) for p, a, b in pairs_of(list(images_of), len(test_prompts), 24, seed=0)]
eight, four = "nano, 8 steps", "nano, 4 steps"
won_by_eight = [won if a == eight else 1 - won for _, a, b, won in games if {a, b} == {eight, four}]
eight_steps.against(round(100 * sum(won_by_eight) / len(won_by_eight)))
print(f"that is {sum(won_by_eight):g} of {len(won_by_eight)}")

if fe.passed("family.elo"):
    rng, final = np.random.default_rng(0), []
    for _ in range(200):  # the same comparisons in 200 orders
        rating = dict.fromkeys(images_of, 1000.0)
        for i in rng.permutation(len(games)):
            _, a, b, won = games[i]
            rating[a], rating[b] = elo(rating[a], rating[b], won)
        final.append([rating[name] for name in images_of])
    final = np.array(final)  # [200, models]
    fig, ax = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    ax.barh(list(images_of), final.mean(0) - 1000, color="#56B4E9")
    lowest, highest = final.min(0) - 1000, final.max(0) - 1000
    ax.hlines(list(images_of), lowest, highest, color="black", lw=2, label="range over 200 orders")
    ax.axvline(0, color="0.5", lw=1)
    ax.set_xlabel(f"Elo above 1000, after the same {len(games)} comparisons")
    widest = 10 * round((highest - lowest).max() / 10)
    ax.set_title(f"Another order of the same comparisons changes a rating by up to {widest} points")
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    plt.show()
    print(f"the sum of the ratings in 200 orders: {final.sum(1).min():.0f} to {final.sum(1).max():.0f}")
    for name, low, high in zip(images_of, lowest, highest):
        print(f"{name:18} between {low:4.0f} and {high:4.0f} points above 1000, depending on the order")

# %% [markdown]
# An Elo rating means nothing without the other contestants, the number of comparisons and the judge. Our judge counts
# claims, and does not know what looks good. You do: judge yourself, without knowing which model made which image. Make
# a choice for each numbered pair; the ratings are updated as you go. (Is the image with the right colours always the
# better one?)

# %%
blind(images_of, [q.prompt for q in test_prompts], pairs=8)

# %% [markdown]
# ## Image-to-image
#
# Image-to-image is the oldest way of editing: add noise to an image, start late in the schedule, and sample from there
# with the new prompt. The *strength*, from 0 to 1, says how much of the schedule is run. We ask for a **green** circle
# where the image has a red one. To measure how much of the image is kept we use the *peak signal-to-noise ratio* (PSNR,
# in decibels): the higher, the more alike two images are.

# %%
source = "a red circle left of a blue square on a white background"
edit = "a green circle left of a blue square on a white background"
outside_circle = object_map(scene) != 0  # bool [128, 128]: everything but the circle should stay as it is


def psnr(image, where):
    """The PSNR of an image against the photo at some pixels; the autoencoder alone gives about 34 dB."""
    return masked_psnr(np.asarray(image), photo, where)


with torch.no_grad():
    decoded = to_images(pipe.autoencoder.decode(clean))[0]
trials = {"the photo": photo, "encoded, decoded": decoded}
for strength in (0.25, 0.5, 0.75):
    out = pipe(edit, image=photo, strength=strength, steps=8, trajectory=False, progress=False)
    trials[f"strength {strength}"] = out.images[0]
for name, image in list(trials.items())[1:]:
    print(f"{name:17} outside the circle {psnr(image, outside_circle):.0f} dB; the judge finds: {found_in(image)}")

# %% [markdown]
# In this image little noise is enough to change the colour. With more noise, more of everything else changes too,
# because the noise is random and unrelated to this image. (Other images need more noise: a table of forty follows
# below.) What if we knew *the* noise from which this image is generated? Then we could start at the very beginning of
# the schedule.
#
# ## Invert, then edit
#
# Sampling follows the velocity from noise to image. *Inversion* follows it back, from the image to noise. An Euler step
# from $t$ to $t'$ is $x' = x + (t' - t)\, v(x, t)$. To invert it, solve for $x$, which is on both sides of
#
# $$x = x' - (t' - t)\, v(x, t)$$
#
# To solve it, begin with the guess $x^{(0)} = x'$ on the right-hand side, and repeat with the result (a *fixed-point
# iteration*):
#
# $$x^{(r+1)} = x' - (t' - t)\, v(x^{(r)}, t)$$
#
# How large is the error after $r$ rounds? Let $h = |t' - t|$, and let $K$ say how fast the velocity changes with its
# input, $\| v(a, t) - v(b, t) \| \le K\, \| a - b \|$. Subtract the two equations above:
#
# $$\| x^{(r+1)} - x \| = h\, \| v(x^{(r)}, t) - v(x, t) \| \le h K\, \| x^{(r)} - x \|
# \quad\Longrightarrow\quad \| x^{(r)} - x \| \le (h K)^r\, h\, \| v(x, t) \|$$
#
# So each round makes the error smaller by the factor $hK$, provided that $hK < 1$: many short steps and a velocity that
# changes slowly. A high guidance scale makes $K$ larger.

# %% exercise="family.invert"


# %%
def velocity_for(prompt, guidance):
    """The network's velocity for a prompt: velocity(x [1, 64, 64], t) -> [1, 64, 64]."""
    text, guidance = pipe.prompt_encoder([prompt]), torch.tensor([guidance], device=device)

    @torch.no_grad()
    def velocity(x, t):
        return pipe.flux(
            x, target_ids, text.txt, txt_ids, torch.tensor([float(t)], device=device), text.pooled, guidance
        )

    return velocity


def sample(x, times, velocity):
    """Euler's method, as in notebook 00."""
    for t, t_next in zip(times[:-1], times[1:]):
        x = x + (t_next - t) * velocity(x, t)
    return x


def to_image(tokens):
    """The image of packed tokens."""
    with torch.no_grad():
        return to_images(pipe.autoencoder.decode(unpack(tokens, 16, 16)))[0]


times = schedule(8, 64, True, pipe.defaults.shift_ends)
if fe.passed("family.invert"):
    test_velocity = lambda x, t: 0.3 * x.roll(1, -1) * (1 + t)  # one for which the iteration converges
    recovered = invert(sample(noise, times, test_velocity), times, test_velocity, rounds=40)
    course.compare("after forty rounds, the start of the run and its noise", recovered, noise, within=1e-4)

    edits = {"photo": photo, **{f"i2i, {name}": trials[name] for name in ("strength 0.25", "strength 0.5")}}
    for scale, rounds in ((1.0, 1), (1.0, 3), (6.0, 1)):
        inverted = invert(pack(clean), times, velocity_for(source, scale), rounds)
        round_trip = sample(inverted, times, velocity_for(source, scale))
        error = float((round_trip - pack(clean)).norm() / clean.norm())
        image = to_image(sample(inverted, times, velocity_for(edit, scale)))
        edits[f"guidance {scale:g}, rounds {rounds}"] = image
        print(
            f"guidance {scale:g}, rounds {rounds}: round-trip error {error:.0%}; edited, outside the circle "
            f"{psnr(image, outside_circle):.0f} dB; the judge finds: {found_in(image)}"
        )
    fig, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
    for ax, (name, image) in zip(axes, edits.items()):
        ax.imshow(image)
        ax.set_title(name, fontsize=8)
        ax.axis("off")
    fig.suptitle("One photo: two edits by image-to-image (i2i) and three after inversion", fontsize=10)
    plt.show()

# %% [markdown]
# Nothing was trained for this. The *round-trip error* is what remains after inverting the image and sampling it again
# with the old prompt. But one photo does not tell which way of editing is better, nor how many rounds are best.
# `python -m evidence inversion` in the repository repeats all of them on forty scenes of two random shapes, with a
# random new colour for the first shape. *Edited* is the share of images in which the judge finds exactly the two
# shapes in the colours asked for; PSNR is the median outside the first shape; the intervals are of 95 %.

# %%
table = evidence.load("inversion")
for name, row in table.items():
    error = row.get("round-trip error")
    round_trip = f", round trip {error['value']:.0%} ({error['low']:.0%} to {error['high']:.0%})" if error else ""
    print(f"{name:32} edited {evidence.percent(row['edited'])}, PSNR {row['PSNR']['value']:.0f} dB{round_trip}")
one, six = (table[f"inverted, guidance {scale}, rounds 1"]["edited"]["value"] for scale in (1, 6))
higher_scale.against("better" if six > one else "worse")

fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for name, row in list(table.items())[1:]:
    colour = "#d55e00" if name.startswith("image") else "#0072b2"
    x, y = row["PSNR"], row["edited"]
    spans = [[[e["value"] - e["low"]], [e["high"] - e["value"]]] for e in (x, y)]
    ax.errorbar(x["value"], y["value"], xerr=spans[0], yerr=spans[1], fmt="o", color=colour, capsize=2)
    ax.annotate(name.split(", ", 1)[1], (x["value"], y["value"]), xytext=(5, 4), textcoords="offset points", fontsize=7)
ax.set(xlabel="PSNR outside the edited shape, dB (higher keeps more)", ylabel="share edited", ylim=(0, 1))
ax.set_title("Forty scenes: image-to-image (orange) and inversion (blue)")
plt.show()

# %% [markdown]
# Read the table row by row. With image-to-image there is one dial: more strength edits more images and keeps less of
# each. Inversion with guidance 1 and one round keeps as much as strength 0.25, the gentlest setting, although its run
# starts at t = 1. It edits 60 % of the images where strength 0.25 edits 45 %, but the two intervals overlap, so forty
# scenes do not show that it is better. Strength 0.5 edits more, and keeps less. What the table does show: with the
# guidance scale 6, inversion edits half as many images and keeps less of them.
#
# And more rounds? By the formula they help if $hK < 1$. With three rounds the round-trip error is small for some scenes
# and large for others (the interval of its median is wide), so for some of them the iteration does not converge with
# these eight steps. The PSNR is lower, too. A small round-trip error would not be enough, anyway: it says that you can
# return to the image, not that you have found good noise to edit from.
#
# ## A LoRA
#
# canny and depth are also published as LoRAs: files with thin matrices that turn dev into these variants. To the weight
# $W$ of a linear layer, a LoRA of *rank* $r$ adds the product of two thin matrices $A$ ($r$ rows) and $B$ ($r$
# columns), multiplied by a constant $\alpha / r$, where $\alpha$ is stored in the file, and by a scale $s$ that you
# choose:
#
# $$W' = W + s\, \frac{\alpha}{r}\, B A$$
#
# Why is the file small? A layer from $d_{\text{in}}$ to $d_{\text{out}}$ numbers has $d_{\text{in}}\, d_{\text{out}}$
# weights, its LoRA far fewer:
#
# $$\frac{r\, (d_{\text{in}} + d_{\text{out}})}{d_{\text{in}}\, d_{\text{out}}}
# = r \Bigl( \frac{1}{d_{\text{in}}} + \frac{1}{d_{\text{out}}} \Bigr)$$
#
# For a layer from 3072 to 3072 and rank 128 this is one twelfth. The official LoRAs also store a bias for each layer.
# Add up all linear layers of dev:

# %%
with meta_init():
    dev = Flux(FluxConfig.variant("canny"))
linears = [m for m in dev.modules() if isinstance(m, torch.nn.Linear)]
size = 0
for m in linears:
    rank = min(128, m.in_features, m.out_features)  # no matrix has a rank above its shorter side
    size += rank * (m.in_features + m.out_features) + m.out_features
print(f"{len(linears)} linear layers, {size:,} numbers at rank 128")
lora_share.against(100 * size / count_parameters(dev))

# %% exercise="family.lora"

# %% [markdown]
# Now make a LoRA yourself. The miniature should *read* red as green, and this change needs no training. For some
# captions we compute what `txt_in`, the layer that reads T5's tokens, receives when they say red and when they say
# green. The best linear map from one to the other solves a least-squares problem, and the largest singular directions
# of the solution give a LoRA.

# %%
colours, forms = ("red", "blue", "yellow", "purple"), ("circle", "square", "star", "ring", "cross")
pairs = [(a, b) for a in colours for b in colours if a != b]
relations = ("left of", "above", "right of")
captions = [f"a {a} {forms[i % 5]} {relations[i % 3]} a {b} {forms[(i + 2) % 5]}" for i, (a, b) in enumerate(pairs * 2)]
captions += [f"a {a} {form}" for a in colours for form in forms]
red = pipe.prompt_encoder(captions).txt.flatten(0, 1)  # [captions * 32, 128]
green = pipe.prompt_encoder([c.replace("a red", "a green") for c in captions]).txt.flatten(0, 1)
gram = red.T @ red
damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(128, device=device)
red_to_green = torch.linalg.solve(damped, red.T @ (green - red))  # [128, 128]: red @ red_to_green is near green - red

weight = pipe.flux.txt_in.weight.detach().clone()  # [160, 128]
U, S, V = torch.linalg.svd(weight @ red_to_green.T, full_matrices=False)
tests = {  # prompt: what the judge should find if red is read as green
    "a red triangle left of a blue square": [("blue", "square"), ("green", "triangle")],
    "a large red star on a white background": [("green", "star")],
    "a yellow ring right of a purple cross": [("purple", "cross"), ("yellow", "ring")],  # no red: nothing should change
}


def lora_factors(rank):
    """The update of `txt_in` by its largest directions: A [rank, 128], B [160, rank]."""
    return V[:rank], U[:, :rank] * S[:rank]


def correct_in_tests():
    """For each test prompt, in how many of five seeds the judge finds what it should."""
    counts = []
    for test_prompt, wanted in tests.items():
        images = pipe(test_prompt, seed=[0, 1, 2, 3, 4], steps=8, trajectory=False, progress=False).images
        counts.append(sum(sorted((o.color, o.form) for o in detect(image).objects) == wanted for image in images))
    return "green triangle {} of 5 · green star {} of 5 · the prompt without red {} of 5".format(*counts)


if fe.passed("family.lora"):
    print(f"without LoRA:           {correct_in_tests()}")
    for rank in (1, 4, 8):
        A, B = lora_factors(rank)
        pipe.flux.txt_in.weight.data = merged(weight, A, B, alpha=float(rank), scale=1.0)
        print(f"rank {rank}: {A.numel() + B.numel():5,} numbers · {correct_in_tests()}")
    mine = pipe.flux.txt_in.weight.data
    pipe.flux.txt_in.weight.data = weight
    library_merge = merge(pipe.flux, {"txt_in.lora_A.weight": A, "txt_in.lora_B.weight": B})
    course.compare("your merged weights and the library's", mine, pipe.flux.txt_in.weight)
    library_merge.unmerge()
    print(f"unmerged, the largest change of a weight is {float((pipe.flux.txt_in.weight - weight).abs().max()):g}")

# %% [markdown]
# The prompts say red, no image was used for training, and yet most red objects are drawn in green at a rank that is
# high enough. The third prompt does not mention red; it is there to check that other prompts are not affected: compare
# its count with that in the first line. (Three prompts with five seeds each are enough to see that the change works,
# and too few to say which rank is best.)
#
# Most changes cannot be computed in this way and have to be trained. The LoRA `hollow` was trained: it has rank 16 for
# every linear layer of the blocks, and took nine minutes on one core, with 1,800 images in which shapes are outlines
# instead of filled. Their captions do not mention this.

# %%
fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.2), layout="constrained")
for ax, scale in zip(axes, (0.0, 0.5, 1.0, 1.5)):
    styled = fe.load("nano", device=device, lora="hollow", lora_scale=scale)
    image = styled("a red square above a blue circle", seed=3, trajectory=False, progress=False).images[0]
    ax.imshow(image)
    ax.set_title(f"scale {scale}", fontsize=9)
    ax.axis("off")
fig.suptitle("The LoRA “hollow”: scale 0 is the model without it, scale 1 is as trained")
plt.show()
tensors = fe.checkpoints.read(WEIGHTS / "lora_hollow" / "pytorch_lora_weights.safetensors")
in_file, in_model = (sum(t.numel() for t in some.values()) for some in (tensors, styled.lora.before))
print(f"{in_file:,} numbers in the file change {in_model:,} weights")

# %% [markdown]
# ## Break it
#
# Change the scale of your own LoRA: negative, zero, and far above 1.

# %%
if fe.passed("family.lora"):
    fig, axes = plt.subplots(1, 5, figsize=(9, 2.2), layout="constrained")
    for ax, scale in zip(axes, (-1.0, 0.0, 0.5, 1.0, 3.0)):
        pipe.flux.txt_in.weight.data = merged(weight, A, B, alpha=8.0, scale=scale)
        star = "a large red star on a white background"
        images = pipe(star, seed=[0, 1, 2, 3, 4], steps=8, trajectory=False, progress=False).images
        found = [found_in(image) for image in images]
        print(
            f"scale {scale:4}: a red star only {found.count('red star')} of 5, green {found.count('green star')} of 5"
        )
        ax.imshow(images[0])
        ax.set_title(f"scale {scale}", fontsize=9)
        ax.axis("off")
    pipe.flux.txt_in.weight.data = weight
    fig.suptitle("“a large red star”, seed 0: scale 0 is the model without the LoRA, scale 1 is as fitted")
    plt.show()

# %% [markdown]
# ## In five lines
#
# 1. All variants have the same blocks. They differ in the numbers per token, the number of tokens, `vec`, and the
#    steps.
# 2. fill reads 384 numbers per token, canny and depth 128; kontext and redux read more tokens.
# 3. An image can be inverted to noise and edited from there. Compare with image-to-image of a low strength, on many
#    images.
# 4. A LoRA adds an update of low rank to the weights; once merged it costs nothing, and it can be unmerged exactly.
# 5. A rating depends on the pairs that were compared, on the judge, and on the order. Ask for all three.
#
# The family in miniature: `fe.load("nano-schnell")`, `"nano-fill"`, `"nano-canny"`, `"nano-depth"`, `"nano-kontext"`,
# `"nano-redux"`, and `fe.load("nano", lora="hollow")`; their measured quality is in `fluxedu/nano/weights/README.md`.
# Which of several models is better, and how sure one can be, is the question of the next notebook.
#
# **Questions people ask**: *Does FLUX use embedded guidance or CFG?* (flux issues 63, 159) dev has the guidance scale
# as an input and needs one evaluation per step; schnell uses neither; CFG with a negative prompt can be used in
# addition with dev (notebook 12). *How were the variants trained?* (flux issue 68) This has not been published: the
# weights show which inputs the variants have, not what they were trained on. *Does a LoRA need more memory?* (flux
# issues 7, 185) A merged LoRA needs none while sampling. Ours keeps the original weights so that unmerging is exact,
# which needs as much memory as the layers that it changed. *Can I convert a model back from diffusers?* (diffusers
# issue 11165) Yes, `fluxedu convert` converts in both directions, for every variant.
#
# **Read**: LoRA, arXiv 2106.09685 · FLUX.1 Kontext, arXiv 2506.15742 · `black-forest-labs/flux`, `sampling.py`
# (`prepare_fill`, `prepare_control`, `prepare_kontext`, `prepare_redux`) · ours: `fluxedu/models/config.py`,
# `fluxedu/checkpoints/lora.py`.

# %%
fe.score()
