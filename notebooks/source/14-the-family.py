# %% [markdown]
# # 14 · The family
#
# **What is the difference between schnell, dev, fill, canny, depth, redux and kontext?** Less than the names suggest:
# they share one architecture. Some have more numbers per token, others have more tokens, and they take different
# numbers of steps. You will build what each variant adds and run your code inside trained variants: we have trained the
# whole family in miniature.
#
# Afterwards you can recognise a variant from its config, build the inputs of fill and redux, and say what few-step
# distillation trains.
#
# 60 minutes · needs notebooks 01b, 04 and 11

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from collections.abc import Callable
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.models import VARIANTS, Flux, ReduxHead
from fluxedu.models.meta_init import meta_init
from fluxedu.nano.exam import masked_psnr, questions
from fluxedu.nano.judge import detect, judge
from fluxedu.nano.scenes import Scene, SceneObject, depth_map, edge_map, render
from fluxedu.sampling.images import to_images, to_tensor
from fluxedu.sampling.latents import draw_noise, image_ids, pack, text_ids, unpack
from fluxedu.sampling.solvers import schedule

device = course.begin()
pipe = fe.load("nano", device=device)
course.where(pipe, "in", "vec", "solver")

# %% [markdown]
# The architectures of the variants differ only in the three highlighted parts: in the input tokens, in what is added to
# `vec` (the vector that the modulation is computed from, notebooks 05 and 05b), and in how the sampler takes its steps.
# The blocks have the same architecture in all of them. (This page loads the miniature's family by name, since its
# members belong together; the official models are `fe.load("schnell")`, `fe.load("fill")` and so on.)
#
# ## Predict

# %%
inverted_mask = fe.predict(
    "nano-fill's mask is inverted, its masked image is right. What is outside the hole, 'kept' or 'repainted'?", "kept"
)  # answer
token_order = fe.predict(
    "redux's image tokens are shuffled. Does the generated image change: 'yes' or 'no'?", "no"
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


print("variant          parameters  numbers/token  guidance input  steps  guidance  txt_len  shift")
for name, variant in VARIANTS.items():
    with meta_init():
        size = count_parameters(Flux(variant.flux))
    defaults = variant.sampling
    guidance_input, shift = ("yes" if flag else "no" for flag in (variant.flux.guidance_embed, defaults.shift))
    row = f"{name:11} {size:14,} {variant.flux.in_channels:14} {guidance_input:>15} {defaults.steps:6}"
    print(f"{row} {defaults.guidance:9g} {defaults.text_length:8}  {shift:>5}")
with meta_init():
    print(f"redux head  {count_parameters(ReduxHead()):14,}")

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

# %% [markdown]
# Now inside the trained variant. The first layer of the network, `img_in`, receives tokens of 384 numbers. We replace
# it by a module that keeps only the 64 numbers of noise, builds the others with your function, and then calls the
# trained layer (`fe.swap`, notebook 00b). The image must stay the same. Then we change what your function receives: the
# mask, or the masked image. The *peak signal-to-noise ratio* (PSNR, in decibels) is higher, the more alike two images
# are: 20 dB is an error of a tenth of the range from black to white, and the miniature's autoencoder alone reaches
# about 34 dB (notebook 01).

# %%
objects = SceneObject("circle", "red", "large", 40, 45, 24), SceneObject("square", "blue", "large", 90, 85, 23)
scene = Scene("white", objects, 128, 128, 3)
photo = render(scene)  # uint8 [128, 128, 3], drawn by a program and not by a network
hole = np.zeros((128, 128), np.float32)
hole[54:124, 65:126] = 1  # around the square
fill = fe.load("nano-fill", device=device)
mask = torch.from_numpy(hole)[None, None].to(device)  # [1, 1, 128, 128]
with torch.no_grad():
    masked = fill.autoencoder.encode(to_tensor(photo).to(device) * (1 - mask))  # [1, 16, 16, 16]
    whole = fill.autoencoder.encode(to_tensor(photo).to(device))  # the same without the hole


def found_in(image):
    """The objects that the judge finds in an image."""
    return ", ".join(f"{found.color} {found.form}" for found in detect(image).objects) or "nothing"


class WithMyTokens(torch.nn.Linear):
    """The first layer of fill, whose tokens are built by `fill_tokens`."""

    def __init__(self, old, masked, mask):
        super().__init__(old.in_features, old.out_features)
        self.masked, self.mask = masked, mask

    def forward(self, tokens):
        noise = unpack(tokens[..., :64], 16, 16)  # [B, 16, 16, 16]
        masked, mask = (x.expand(len(noise), -1, -1, -1) for x in (self.masked, self.mask))
        return super().forward(fill_tokens(noise, masked, mask))


prompt, seeds = "a red circle left of a yellow star", list(range(8))
settings = {"image": photo, "mask": hole, "steps": 8, "paste": False, "trajectory": False, "progress": False}
theirs = fill(prompt, seed=seeds, **settings)
if fe.passed("family.fill"):
    inputs = {"your tokens": (masked, mask), "mask inverted": (masked, 1 - mask), "no hole in the image": (whole, mask)}
    shown, outside = {"original": photo}, {}
    for name, (my_masked, my_mask) in inputs.items():
        with fe.swap("img_in", lambda old: WithMyTokens(old, my_masked, my_mask), fill):
            mine = fill(prompt, seed=seeds, **settings)
        if name == "your tokens":
            course.compare("eight latents, your tokens and the library's", mine.latents, theirs.latents, within=1e-3)
        outside[name], inside = (
            [masked_psnr(np.asarray(image), photo, where) for image in mine.images] for where in (hole == 0, hole > 0)
        )
        ends = [f"{min(values):.0f} to {max(values):.0f} dB" for values in (outside[name], inside)]
        stars = sum("yellow star" in found_in(image) for image in mine.images)
        alone = sum("," not in found_in(image) for image in mine.images)
        print(f"{name:20} a yellow star in {stars} of 8 images, fewer than two objects in {alone};", end=" ")
        print(f"PSNR outside the hole {ends[0]}, inside {ends[1]}")
        shown[name] = mine.images[0]
    inverted_mask.against("kept" if np.median(outside["mask inverted"]) > 20 else "repainted")
    fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.3), layout="constrained")
    for ax, (name, image) in zip(axes, shown.items()):
        ax.imshow(image)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    fig.suptitle("nano-fill with your tokens, and with two changes of them", fontsize=10)
    plt.show()

# %% [markdown]
# For this photo, nano-fill removes the square in all three cases, and some images show a star, with the right mask and
# with the inverted one. But if the image has no hole, no star appears, and in most images the square's place stays
# empty: here the network needs the grey area of the masked image to draw a star, and the mask alone is not enough.
# (One photo only.)
#
# The network reads 384 numbers per token and predicts 64: masked image and mask are inputs, and never predicted.
# **canny** and **depth** are simpler: they read a second latent, of the edges or of the depth map, 64 + 64 = 128
# numbers.
#
# ## More tokens: kontext
#
# kontext edits an image, the *reference image*, according to an instruction. The tokens of the reference image come
# after those of the image to be generated, the *target*. Their position ids (notebook 04) have 1 in the frame
# coordinate, which is 0 for all other tokens. With N target tokens, M reference tokens and L text tokens, every block's
# attention is over
#
# $$\underbrace{L}_{\text{text}} + \underbrace{N}_{\text{frame } 0} + \underbrace{M}_{\text{frame } 1}
# \quad \text{tokens; for a megapixel } 512 + 4096 + 4096$$
#
# The network predicts a velocity for all image tokens; that of the reference tokens is discarded. (Official code, same
# commit: `sampling.py`, `prepare_kontext` line 251 sets the frame, `denoise` line 349 keeps the target's velocity.) You
# will build this in notebook 14b.
#
# ## More tokens: redux
#
# The prompt of redux is an image. A vision encoder (SigLIP) turns the image into 729 feature vectors, a head of two
# layers maps them to the width of T5's tokens, and from there on they are treated as text tokens. (Official code, same
# commit: `ReduxImageEncoder` in `modules/image_embedders.py` lines 64-99, and `prepare_redux` in `sampling.py`, whose
# line 192 appends the tokens to T5's.)

# %% exercise="family.redux"

# %% [markdown]
# nano-redux has an encoder and a head of its own. The text input of the transformer is the site `sample.txt`; there
# `fe.intervene` puts your tokens in place of the pipeline's. A second run shuffles the tokens of the image.

# %%
redux = fe.load("nano-redux", device=device)
settings = {"image_prompt": photo, "seed": 1, "steps": 8, "trajectory": False, "progress": False}
theirs = redux("", **settings)
if fe.passed("family.redux"):
    with torch.no_grad():
        image_tokens = redux.redux(to_tensor(photo).to(device))  # [1, M, 128]
    t5_tokens = redux.prompt_encoder([""]).txt  # [1, 32, 128]
    shuffled = image_tokens[:, torch.randperm(image_tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    results = {}
    for name, tokens in {"your tokens": image_tokens, "shuffled": shuffled, "no image": 0 * image_tokens}.items():
        with fe.intervene("sample.txt", lambda txt, ctx: with_image_tokens(t5_tokens, tokens)[0]):
            results[name] = redux("", **settings)
    course.compare(
        "the latent with your tokens and the library's", results["your tokens"].latents, theirs.latents, 1e-3
    )
    course.compare("the latent with shuffled tokens and in order", results["shuffled"].latents, theirs.latents, 1e-3)
    change = float((results["shuffled"].latents - theirs.latents).norm() / theirs.latents.norm())
    token_order.against("yes" if change > 1e-3 else "no")
    number = len(detect(results["no image"].images[0]).objects)
    print("the judge finds", found_in(theirs.images[0]))
    print(f"with zeros in place of the image's tokens, it finds {number} objects")

# %% [markdown]
# All of these tokens have the position id (0, 0, 0), so the network does not know their order: attention sums over
# tokens,
#
# $$\sum_j \operatorname{softmax}_j(q \cdot k_j)\, v_j,$$
#
# and a sum is the same in any order. Where something was in the image must be contained in the tokens themselves.
#
# ## All variants at work
#
# One image, five variants. The miniature's canny and depth are LoRAs (notebook 14c); official LoRA versions exist too.
# Their control images here are drawn from the scene; `fluxedu.sampling.images.edges(photo)` finds the edges of any
# image. This is one image and one seed per variant, to show what goes in and what comes out; how often each does what
# it should, measured on 110 to 500 scenes, is in `fluxedu/nano/weights/README.md`.

# %%
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

fig, axes = plt.subplots(2, 5, figsize=(9, 4.2), layout="constrained")
for (above, below), (name, (input_image, prompt, arguments)) in zip(axes.T, examples.items()):
    variant = fe.load(f"nano-{name}", device=device)
    out = variant(prompt, seed=1, steps=10, trajectory=False, progress=False, **arguments)
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
# pastes the original pixels back (above we turned this off with `paste=False`). canny and depth keep the *positions*
# and take the colours from the prompt. kontext keeps nearly everything that the instruction does not mention. redux
# keeps *which* objects there are, not where they are.
#
# ## Few steps
#
# schnell needs only one to four steps because it was trained for them, by adversarial distillation (arXiv 2403.12015);
# without that training the same network needs more. `nano-schnell` is the miniature after further training by a simpler
# method: one round of distillation along the teacher's trajectories (progressive distillation, arXiv 2202.00512,
# instead halves the number of steps again and again). The miniature, the *teacher*, samples in 20 steps, and its states
# $y_0, \dots, y_4$ at the five times $t_0 = 1 > t_1 > \dots > t_4 = 0$ are stored. The student learns the constant
# velocity that leads from each of them to the next in a single Euler step (`schnell_loss` in `training/schnell.py`):
#
# $$L = \Bigl\| v_\theta(y_k, t_k) - \frac{y_{k+1} - y_k}{t_{k+1} - t_k} \Bigr\|^2$$
#
# So the student learns chords of the teacher's curved path (notebook 10); the teacher has learned tangents.

# %% exercise="family.chords"

# %% [markdown]
# With the teacher's own chords, four steps must lead exactly to the teacher's image. We sample eight seeds in 20 steps,
# keep five states, and put your chords in place of the network's velocity (the site `sample.velocity`). A student can
# only approximate this: it must know the chord before the path is known.

# %%
text = "a yellow star above a purple ring"
teacher = pipe(text, seed=seeds, progress=False)
stored = [0, 10, 15, 18, 20]  # numbers of teacher steps
times, states = teacher.trajectory.times[stored], teacher.trajectory.latents[stored]
print("stored times:", *(f"{float(t):.2f}" for t in times))
four_steps = {"times": times, "seed": seeds, "trajectory": False, "progress": False}
if fe.passed("family.chords"):
    velocities = chords(states, times.to(device))  # [4, 8, 16, 16, 16]
    # the pipeline generates one image at a time; its seed, 0 to 7, is also its index in `velocities`
    chord = lambda v, ctx: velocities[ctx.step][[ctx.step_context.request.seed]]  # [1, 16, 16, 16]
    with fe.intervene("sample.velocity", chord):
        mine = pipe(text, **four_steps)
    course.compare("four steps along your chords and the teacher's twenty", mine.latents, teacher.latents, within=1e-3)
tangents = pipe(text, **four_steps).latents
far = (tangents - teacher.latents).flatten(1).norm(dim=1) / teacher.latents.flatten(1).norm(dim=1)
print(f"four steps along the teacher's tangents end {far.min():.0%} to {far.max():.0%} away (8 seeds)")

# %% [markdown]
# Now the trained student, with forty prompts of the miniature's exam; `claim` lists what a correct image must show.

# %%
schnell = fe.load("nano-schnell", device=device)
exam = [q for q in questions(320) if q.size == (128, 128)][:40]
in_four_steps = {}
for name, model in {"nano": pipe, "nano-schnell": schnell}.items():
    exam_prompts, exam_seeds = [q.prompt for q in exam], [q.seed for q in exam]
    in_four_steps[name] = model(exam_prompts, seed=exam_seeds, steps=4, trajectory=False, progress=False).images
    right = sum(judge(image, q.claim).everything for image, q in zip(in_four_steps[name], exam))
    print(f"{name}, 4 steps: {right} of {len(exam)} images entirely right")
fewer = count_parameters(pipe.flux) - count_parameters(schnell.flux)
print(f"nano-schnell has {fewer:,} parameters fewer: it has no guidance input")
fig, axes = plt.subplots(2, 6, figsize=(8.4, 3.2), layout="constrained")
for row, (name, images) in zip(axes, in_four_steps.items()):
    for ax, image in zip(row, images):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
fig.suptitle(
    "Four steps: almost no image is right without training for them (above), most with it (below)", fontsize=10
)
plt.show()

# %% [markdown]
# ## In five lines
#
# 1. All variants have the same blocks. They differ in the numbers per token, the number of tokens, `vec`, and the
#    steps.
# 2. fill reads 384 numbers per token, canny and depth 128.
# 3. kontext reads a second image as more image tokens, in frame 1, and discards their velocity.
# 4. redux reads an image as more text tokens, all at position (0, 0, 0), so their order does not matter.
# 5. schnell is dev's architecture without the guidance input, trained to take few steps.
#
# The family in miniature: `fe.load("nano-schnell")`, `"nano-fill"`, `"nano-canny"`, `"nano-depth"`, `"nano-kontext"`,
# `"nano-redux"`, and `fe.load("nano", lora="hollow")`. Editing is the subject of notebook 14b, LoRA of 14c.
#
# **Questions people ask**: *Does FLUX use embedded guidance or CFG?* (flux issues 63, 159) dev has the guidance scale
# as an input and needs one evaluation per step; schnell uses neither; CFG with a negative prompt can be used in
# addition with dev (notebook 12b). *How were the variants trained?* (flux issue 68) Published only in part: the
# report on kontext says that its training began with a FLUX.1 checkpoint, with the rectified-flow loss and
# logit-normal times, followed by distillation (adversarial, LADD, for pro; of the guidance for dev). The training of
# fill, canny, depth and redux is not published.
#
# **Read**: FLUX.1 Kontext, arXiv 2506.15742 · `black-forest-labs/flux`, `sampling.py` (`prepare_fill`,
# `prepare_control`, `prepare_kontext`, `prepare_redux`) · ours: `fluxedu/models/config.py`,
# `fluxedu/sampling/conditions.py`.

# %%
fe.score()
