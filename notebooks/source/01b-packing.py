# %% [markdown]
# # 01b · Packing into tokens
#
# **What does one token of the transformer stand for?** The autoencoder of notebook 01 gives a grid of cells with 16
# numbers each. The transformer works on a sequence of tokens, so the latent is cut into squares of 2 × 2 cells, and the
# result of a run is put together again. You will write both directions, run them inside the trained model, and
# measure how far one token and one cell reach in the image.
#
# Afterwards you can cut a latent into tokens and put it together again, say which pixels a token covers, and recognise
# the damage that a wrong order of numbers does.
#
# 60 minutes · needs notebook 01

# %%
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import render, scenes, to_tensor
from fluxedu.sampling import latents as library

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
autoencoder = deepcopy(pipe.autoencoder).float()  # a float32 copy to measure with, whatever the pipeline's dtype
prompt = "a red circle left of a blue square on a white background"
reference = pipe(prompt, seed=4, progress=False)

test_scenes = [scene for scene, _ in zip(scenes(1, size=(128, 128), held_out=True), range(16))]
images = to_tensor(np.stack([render(scene) for scene in test_scenes])).to(device)  # [16, 3, 128, 128] in [-1, 1]
latent = autoencoder.encode(images)  # [16, 16, 16, 16]
course.where(pipe, "noise", "in", "image")

# %% [markdown]
# ## Predict
#
# In the second question, the *judge*, a small program of this course that finds shapes and colours in an image, looks
# at 40 images of five prompts: 'ruined' means that none of them shows the two objects of the prompt and nothing else,
# and 'a bit worse' that fewer of them do than before. In the third, all 16 numbers of one cell of a latent are changed.

# %%
last_token = fe.predict(
    "An image of 1024 x 1024 pixels: what is the index of its last token, if the first is 0?", 4095
)  # answer
reorder_effect = fe.predict(
    "The numbers inside each token are reordered. Is the image 'the same', 'a bit worse' or 'ruined'?", "ruined"
)  # answer
cell_reach = fe.predict(
    "How many percent of the change in the image lie in the cell's own pixels and in those of its eight neighbours?", 93
)  # answer

# %% [markdown]
# ## Start small
#
# Take a latent with one channel and 4 × 4 cells, numbered row by row. It has four tokens, and each holds the four
# numbers of one square of 2 × 2 cells:

# %%
small = torch.arange(16.0).reshape(1, 1, 4, 4)
print("the latent:", *small[0, 0].int().tolist(), sep="\n  ")
print("its tokens:", *library.pack(small)[0].int().tolist(), sep="\n  ")

# %% [markdown]
# ## Build it
#
# Now with $C$ channels. Write $z[k, y, x]$ for channel $k$ of the cell in row $y$ and column $x$ of a latent that is
# $w$ cells wide. The tokens are numbered row by row, and number $4k + 2i + j$ of a token belongs to channel $k$ of its
# cell in row $i$ and column $j$ ($i$ and $j$ are 0 or 1):
#
# $$\text{token}\Bigl[\, r\, \tfrac{w}{2} + c,\;\; 4k + 2i + j \,\Bigr] = z[\, k,\; 2r + i,\; 2c + j \,]$$

# %% exercise="latents.pack"

# %% exercise="latents.unpack"

# %%
if fe.passed("latents.pack", "latents.unpack"):
    print("tokens:", list(pack(latent).shape))
    course.compare("your tokens and the library's", pack(latent), library.pack(latent))
    course.compare("the latent after pack and unpack, and the original latent", unpack(pack(latent), 16, 16), latent)

# %% [markdown]
# Packing only reorders numbers; no value changes. Afterwards the transformer has a quarter as many tokens, each four
# times as wide.
#
# Which token covers which pixel? A cell covers 8 × 8 pixels, so a token covers 16 × 16, and an image $W$ pixels wide
# has $W / 16$ tokens per row. The pixel in row $y$ and column $x$ belongs to the token
#
# $$n(y, x) = \Bigl\lfloor \frac{y}{16} \Bigr\rfloor \frac{W}{16} + \Bigl\lfloor \frac{x}{16} \Bigr\rfloor$$

# %% exercise="latents.token_at"

# %%
print("tokens of a 1024 x 1024 image:", (1024 // 16) ** 2)
if fe.passed("latents.token_at"):
    last_token.against(token_at(1023, 1023, 1024))

# %% [markdown]
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
# its latent. How far does the influence of one cell reach? We change all 16 numbers of one cell, in each of sixteen
# images, decode, and measure which share of the squared change lies near the cell. With $d(y, x)^2$ for the squared
# change of a pixel, summed over its three colours, and a box of pixels around the cell,
#
# $$\text{share} = \sum_{(y, x)\, \in\, \text{box}} d(y, x)^2 \Bigm/ \sum_{(y, x)} d(y, x)^2$$

# %% exercise="latents.share_near"

# %%
if fe.passed("latents.share_near"):
    edited = latent.clone()
    edited[:, :, 8, 8] += 2
    before, after = autoencoder.decode(latent), autoencoder.decode(edited)
    for name, margin in {"the cell's own 8 x 8 pixels": 0, "these and the eight cells around them": 8}.items():
        share = share_near(before, after, 8, 8, margin)  # [16]
        print(f"{name}: {share.median():.0%} of the change ({share.min():.0%} to {share.max():.0%})")
    cell_reach.against(round(100 * float(share_near(before, after, 8, 8, 8).median())))

# %% [markdown]
# Now edit a latent yourself. Change the values of a few cells in one channel and see what happens to the image; a
# change of a single cell is hardly visible. (Tab to the left image and use the arrow keys, or use the mouse.) Does any
# channel stand for one property, such as a colour? Nothing in the training requires that.

# %%
widgets.latents(pipe, prompt, seed=4, progress=False).set(channel=14, cell=(5, 11))

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.intervene` replaces the value at a site by that of a function. `my_tokens` replaces the output of the
# transformer's first layer, at the site `img_in`, by what this layer makes of your tokens. `my_velocity` unpacks the
# velocity's tokens with your `unpack`; the result, which has the shape of a latent, replaces the pipeline's velocity.
# `remember` only stores what it sees. Both replacements act in every step of the run, so one wrong number would change
# the image.

# %%
seen = {}


def remember(name):
    """A function for fe.intervene that stores the value under this name and leaves it as it is."""

    def change(value, ctx):
        seen[name] = value
        return value

    return change


if fe.passed("latents.pack", "latents.unpack"):
    my_tokens = lambda tokens, ctx: pipe.flux.img_in(pack(seen["state"]))
    my_velocity = lambda velocity, ctx: unpack(seen["velocity"], *reference.latents.shape[-2:])
    with fe.intervene("sample.x", remember("state")), fe.intervene("img_in", my_tokens):
        with fe.intervene("velocity", remember("velocity")), fe.intervene("sample.velocity", my_velocity):
            out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent of the run with your code and without", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# Your `token_at` can point at an object. Take a pixel of the red circle, and set the velocity of its token to zero in
# every step, so that this token stays the noise that it was. What do you expect to see in the image,
# and where?

# %%
if fe.passed("latents.token_at"):
    width = reference.images[0].width
    token = token_at(40, 29, width)
    print("the pixel in row 40 and column 29 belongs to token", token)
    with fe.ablate("velocity", tokens=[token]):
        out = pipe(prompt, seed=4, progress=False)
    moved = (library.pack(out.latents) - library.pack(reference.latents)).square().sum(-1)[0]  # [tokens]
    print("token that has changed most:", int(moved.argmax()))

    row, column = divmod(token, width // 16)
    fig, axes = plt.subplots(1, 2, figsize=(5.4, 2.9), layout="constrained")
    for ax, image in zip(axes, (reference.images[0], out.images[0])):
        ax.imshow(image)
        ax.add_patch(plt.Rectangle((16 * column, 16 * row), 16, 16, fill=False, edgecolor="black", linestyle="--"))
        ax.axis("off")
    fig.suptitle(f"Without a velocity, token {token} stays noise", fontsize=10)
    plt.show()

# %% [markdown]
# ## Break it
#
# **Another order inside the token.** Each token contains the right 64 numbers, but in another order: now the channel
# changes fastest. A wrong `view` or `transpose` easily produces this order by accident. The judge counts, for five
# prompts and eight seeds, the images that show the two objects of the prompt and nothing else. (“At least”, because
# rounding on another machine can change one image.)


# %%
def pack_channel_fastest(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, 2, 2, C]
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def run(a: str, b: str) -> list:
    """Eight images, seeds 0 to 7, of two objects."""
    prompt = f"a{'n' * (a[0] in 'aeiou')} {a} left of a{'n' * (b[0] in 'aeiou')} {b} on a white background"
    return pipe(prompt, seed=list(range(8)), steps=8, trajectory=False, progress=False).images


def count_right(images: list, objects: tuple[str, str]) -> int:
    """In how many images the judge finds these two objects and nothing else."""
    found = [sorted(f"{thing.color} {thing.form}" for thing in detect(image).objects) for image in images]
    return found.count(sorted(objects))


pairs = [
    ("red circle", "blue square"),
    ("green triangle", "orange ring"),
    ("purple cross", "cyan star"),
    ("blue ring", "red triangle"),
    ("orange square", "green circle"),
]
wrong_tokens = lambda tokens, ctx: pipe.flux.img_in(pack_channel_fastest(seen["state"]))
right_order = [run(*pair) for pair in pairs]
with fe.intervene("sample.x", remember("state")), fe.intervene("img_in", wrong_tokens):
    reordered = [run(*pair) for pair in pairs]
before, after = (sum(map(count_right, images, pairs)) for images in (right_order, reordered))
print(f"images with both objects: with the right order at least {before // 5 * 5} of 40, with the other one {after}")
reorder_effect.against("ruined" if after == 0 else "a bit worse" if after < before else "the same")

fig, axes = plt.subplots(2, 5, figsize=(8, 3.6), layout="constrained")
for row, images in enumerate((right_order, reordered)):
    for ax, of_pair in zip(axes[row], images):
        ax.imshow(of_pair[0])
        ax.axis("off")
fig.suptitle(f"Top: the right order, {before} of 40 images right. Bottom: channel fastest, {after} of 40", fontsize=10)
plt.show()

# %% [markdown]
# The wrong order raises no error, because every shape is right. If another implementation draws only patterns, first
# compare its tokens with correct ones.
#
# ## In five lines
#
# 1. A token is a square of 2 × 2 latent cells, so it covers 16 × 16 pixels and has 4 × 16 = 64 numbers.
# 2. Tokens are numbered row by row; inside a token, the order is (channel, row, column).
# 3. Packing loses nothing: it only reorders numbers. A trained transformer works with this order only.
# 4. The latent preserves positions, so a token or a cell that is changed changes the image there and around it.
# 5. A 1024 × 1024 image has 4,096 tokens.
#
# **Questions people ask**: *Why does my 1000-pixel image come out with another size?* A side must be a whole number of
# tokens of 16 pixels. The official code rounds up, to 126 cells of 8 pixels (`get_noise`, `sampling.py` lines 29-30 of
# `black-forest-labs/flux` at commit 802fb47); diffusers rounds down, to 124 (`FluxPipeline.prepare_latents`, 0.42.1).
# *Why 2 × 2 cells and not one?* One cell per token would mean four times as many tokens and 16 times as many pairs.
#
# **Read**: Scalable Diffusion Models with Transformers, arXiv 2212.09748 (patches of latents as tokens) ·
# `black-forest-labs/flux`, `sampling.py` · ours: `fluxedu/sampling/latents.py`.

# %%
fe.score()
