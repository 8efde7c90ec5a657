# %% [markdown]
# # 14c · LoRA
#
# **How can a file change a model of a hundred times its size?** By storing not new weights but an update of low rank.
# You will count, build, merge and fit such updates, and run them inside the miniature.
#
# Afterwards you can say how large a LoRA is, merge one or run it beside its layer, extract one from a trained model,
# and say how much of a change is lost at a low rank.
#
# 60 minutes · needs notebook 14

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.checkpoints.lora import merge
from fluxedu.course import evidence
from fluxedu.loading import WEIGHTS
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.nano.judge import detect

device = course.begin()
pipe = fe.load("nano-schnell", device=device)
course.where(pipe, "in", "vec", "double", "single", "final")

# %% [markdown]
# A LoRA can change any linear layer; every highlighted part contains linear layers. We use nano-schnell (notebook 14),
# since four steps are enough for it.
#
# ## Predict

# %%
lora_share = fe.predict("How large is canny's LoRA of rank 128, in percent of the model's parameters?", 5.2)  # answer
rank_one = fe.predict("Does 'rank 1' suffice to turn red into green, or is 'rank 8' needed?", "rank 8")  # answer
rank_64 = fe.predict(
    "nano-kontext's change is approximated with rank 64 of 160. Does it edit 'as many' images or 'fewer'?", "fewer"
)  # answer

# %% [markdown]
# ## An update of low rank
#
# To the weight $W$ of a linear layer, a LoRA (*low-rank adaptation*) of *rank* $r$ adds the product of two thin
# matrices
# $A$ ($r$ rows) and $B$ ($r$ columns), multiplied by a constant $\alpha / r$, where $\alpha$ is stored in the file, and
# by a scale $s$ that you choose:
#
# $$W' = W + s\, \frac{\alpha}{r}\, B A$$
#
# A tiny example: with $A = (1 \; 2)$ and $B = (3 \; 0)^T$, four numbers, $BA$ is the matrix with the rows (3, 6) and
# (0, 0). Every row is a multiple of $A$: that is what rank 1 means.
#
# Why is the file small? A layer from $d_{\text{in}}$ to $d_{\text{out}}$ numbers has $d_{\text{in}}\, d_{\text{out}}$
# weights, its LoRA far fewer:
#
# $$\frac{r\, (d_{\text{in}} + d_{\text{out}})}{d_{\text{in}}\, d_{\text{out}}}
# = r \Bigl( \frac{1}{d_{\text{in}}} + \frac{1}{d_{\text{out}}} \Bigr)$$
#
# For a layer from 3072 to 3072 and rank 128 this is one twelfth.

# %% exercise="lora.count"

# %% [markdown]
# canny and depth (notebook 14) are also published as LoRAs, which change all linear layers of dev. The network below is
# created on PyTorch's *meta* device: its tensors have shapes but no data.

# %%
with meta_init():
    dev = Flux(FluxConfig.variant("canny"))
parameters = sum(p.numel() for p in dev.parameters())
if fe.passed("lora.count"):
    shapes = [(m.in_features, m.out_features) for m in dev.modules() if isinstance(m, nn.Linear)]
    for rank in (4, 16, 128):
        size = lora_size(shapes, rank)
        print(f"rank {rank:3}: {size:13,} numbers in {len(shapes)} layers, {size / parameters:.2%} of the model")
    lora_share.against(100 * size / parameters)

# %% exercise="lora.merge"

# %% [markdown]
# ## Beside the layer
#
# A LoRA does not have to be merged. Since $(W + BA)\, x = W x + B\,(A x)$, the layer can stay as it is, and the update
# is added to its output. This takes some time in every step, but several LoRAs can be exchanged quickly, and weights
# that are quantised stay untouched.

# %% exercise="lora.layer"

# %% [markdown]
# ## A LoRA without training
#
# Now make a LoRA yourself. The miniature should *read* red as green, and this change needs no training. For some
# captions we compute what `txt_in`, the layer that reads T5's tokens, receives when they say red (the rows of $X$) and
# when they say green ($Y$). The linear map $M$ that changes one into the other solves a least-squares problem with a
# small damping $\lambda$:
#
# $$\min_M \| X M - (Y - X) \|^2 + \lambda \| M \|^2 \quad \Longrightarrow \quad
# M = (X^T X + \lambda I)^{-1} X^T (Y - X), \qquad \Delta W = W M^T$$

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
update = weight @ red_to_green.T  # [160, 128]
strengths = torch.linalg.svdvals(update)
print("its singular values:", *(f"{float(value):.1f}" for value in strengths[:10]), "... of", len(strengths))

# %% [markdown]
# This update has full rank. What is its best approximation of rank $r$? Every matrix is a sum of rank-1 matrices with
# the singular values $\sigma_1 \ge \sigma_2 \ge \dots$ as their sizes. The best approximation consists of the $r$
# largest terms (Eckart and Young, 1936), and its squared error is the sum of the squares that are left out:
#
# $$\Delta W = \sum_k \sigma_k\, u_k v_k^T, \qquad \Bigl\| \Delta W - \sum_{k \le r} \sigma_k\, u_k v_k^T \Bigr\|^2
# = \sum_{k > r} \sigma_k^2$$

# %% exercise="lora.factors"

# %% [markdown]
# We put your factors into your layer, and your layer into the miniature. Does it draw red things in green? The eight
# prompts with red have five seeds each; the last row of counts is a control, eight prompts without red, which should be
# drawn as they say.

# %%
other_forms, rest = ("triangle", "star"), ("blue square", "yellow ring", "purple cross", "cyan circle")
with_red = {f"a red {form} left of a {other}": (f"green {form}", other) for form in other_forms for other in rest}
without_red = {f"a pink {form} left of a {other}": (f"pink {form}", other) for form in other_forms for other in rest}


def correct(prompts):
    """In how many of the images (five seeds for each prompt) the judge finds exactly what it should."""
    images = pipe([p for p in prompts for _ in range(5)], seed=[0, 1, 2, 3, 4] * len(prompts), **quiet).images
    expected = [sorted(wanted) for wanted in prompts.values() for _ in range(5)]
    return sum(sorted(f"{o.color} {o.form}" for o in detect(i).objects) == w for i, w in zip(images, expected))


quiet = {"trajectory": False, "progress": False}
print(f"without LoRA: red drawn in green {correct(with_red)} of 40, without red right {correct(without_red)} of 40")
if fe.passed("lora.merge", "lora.layer", "lora.factors"):
    changed = {}
    for rank in (1, 8):
        A, B = factors(update, rank)
        with fe.swap("txt_in", LoRALinear(pipe.flux.txt_in, A, B, 1.0), pipe):
            changed[rank] = correct(with_red)
            print(f"rank {rank}: red drawn in green {changed[rank]} of 40")
            if rank == 8:
                print(f"rank {rank}: prompts without red right {correct(without_red)} of 40")
    rank_one.against("rank 1" if changed[1] > changed[8] / 2 else "rank 8")

    with fe.swap("txt_in", LoRALinear(pipe.flux.txt_in, A, B, 1.0), pipe):
        beside = pipe("a red star", seed=0, **quiet)
    pipe.flux.txt_in.weight.data = merged(weight, A, B, alpha=8.0, scale=1.0)
    inside = pipe("a red star", seed=0, **quiet)
    mine = pipe.flux.txt_in.weight.data
    pipe.flux.txt_in.weight.data = weight
    course.compare(
        "the latent with your layer and with your merged weight", beside.latents, inside.latents, within=1e-3
    )
    library_merge = merge(pipe.flux, {"txt_in.lora_A.weight": A, "txt_in.lora_B.weight": B})
    course.compare("your merged weight and the library's", mine, pipe.flux.txt_in.weight)
    library_merge.unmerge()
    print(f"unmerged, the largest change of a weight is {float((pipe.flux.txt_in.weight - weight).abs().max()):g}")

# %% [markdown]
# The prompts say red, and no image was used for training, yet at rank 8 most red objects are drawn in green. The
# largest singular value alone, rank 1, does not do it. The control shows that prompts without red still work: compare
# its count with that of the model without the LoRA.
#
# ## A LoRA that was trained
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
# ## How much of a change is kept at a low rank?
#
# nano-kontext was trained without a LoRA: all its weights changed. So we can compute the change of each linear layer,
# cut it down to rank $r$ with the method of your `factors`, and add it to the miniature. `python -m evidence kontext`
# did so, with the forty edits of notebook 14b. (Rank 0 is the control: there only the other parameters, such as biases,
# are those of nano-kontext.) We look at one layer here.

# %%
kontext = fe.load("nano-kontext", device=device)
name = "single_blocks.3.linear1.weight"
nano = fe.load("nano", device=device)
change = kontext.flux.get_parameter(name).detach() - nano.flux.get_parameter(name).detach()  # [1120, 160]
if fe.passed("lora.factors"):
    for rank in (1, 4, 16, 64):
        A, B = factors(change, rank)
        left = float((change - B @ A).norm() / change.norm())
        print(f"{name}, rank {rank:2}: {left:.0%} of the change is left out, as a share of its norm")

ranks = evidence.load("kontext")
fig, ax = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
in_order = sorted(ranks, key=lambda name: int(name.removeprefix("rank ")) if name.startswith("rank") else 160)
evidence.plot(ax, {name: ranks[name]["edited"] for name in in_order})
ax.set(ylabel="share edited (n = 40)", ylim=(0, 1), title="nano-kontext's change is not of low rank")
plt.show()
for name, row in ranks.items():
    print(f"{name:12} edited {evidence.percent(row['edited'])}, PSNR {evidence.number(row['PSNR'], 0)}")
edits = list(zip(ranks["nano-kontext"]["edited"]["hits"], ranks["rank 64"]["edited"]["hits"]))  # the same edit twice
print(f"at rank 64, {edits.count(('1', '0'))} edits are lost and {edits.count(('0', '1'))} is gained")
few, all_of_it = ranks["rank 64"]["edited"]["value"], ranks["nano-kontext"]["edited"]["value"]
rank_64.against("fewer" if few < 0.9 * all_of_it else "as many")

# %% [markdown]
# Reading a second image is a large change, and low ranks lose most of it. Even at rank 64 of 160, 11 of the 40 edits
# are lost and only 1 is gained. nano-canny is different: cut down to rank 48 it is about as good as before (94.8 % of
# the objects in place on 200 scenes; 94.9 % with the full weights, on fewer scenes; its model card). A LoRA that is
# *trained* at a low rank may also be better than one that is cut down afterwards.
#
# ## Break it
#
# Change the scale of your own LoRA: negative, zero, and far above 1.

# %%
if fe.passed("lora.layer", "lora.factors"):
    A, B = factors(update, 8)
    fig, axes = plt.subplots(1, 5, figsize=(9, 2.2), layout="constrained")
    for ax, scale in zip(axes, (-1.0, 0.0, 0.5, 1.0, 3.0)):
        with fe.swap("txt_in", LoRALinear(pipe.flux.txt_in, A, B, scale), pipe):
            images = pipe("a large red star on a white background", seed=list(range(8)), **quiet).images
        found = [[f"{o.color} {o.form}" for o in detect(image).objects] for image in images]
        print(f"scale {scale:4}: a red star {found.count(['red star'])} of 8, green {found.count(['green star'])} of 8")
        ax.imshow(images[0])
        ax.set_title(f"scale {scale:g}", fontsize=9)
        ax.axis("off")
    fig.suptitle("“a large red star”, seed 0: scale 0 is the model without the LoRA, scale 1 is as fitted", fontsize=10)
    plt.show()

# %% [markdown]
# The update was fitted for scale 1. At half of it, the judge finds neither a red nor a green star in most images, and
# at scale 3 it finds fewer green ones than at scale 1. A negative scale leaves the star red.
#
# ## In five lines
#
# 1. A LoRA adds BA to a weight, with r (d_in + d_out) numbers instead of d_in d_out.
# 2. Once merged it needs no extra time, and it can be unmerged exactly; beside the layer it leaves the weights
#    untouched.
# 3. The best approximation of rank r keeps the r largest singular values.
# 4. A small change of one layer can be computed by least squares, without training.
# 5. How much rank a change needs depends on the change: measure it.
#
# **Questions people ask**: *Does a LoRA need more memory?* (flux issues 7, 185) A merged LoRA needs none while
# sampling. Ours keeps the original weights so that unmerging is exact, which needs as much memory as the layers that it
# changed. *Can I merge two LoRAs?* Yes, updates are added, but they were not trained together. *Can I convert a model
# back from diffusers?* (diffusers issue 11165) Yes, `fluxedu convert` converts in both directions, for every variant.
#
# **Read**: LoRA, arXiv 2106.09685 · ours: `fluxedu/checkpoints/lora.py`, `evidence/kontext.py`.

# %%
fe.score()
