# %% [markdown]
# # 05 · Time and modulation
#
# **How does the network know how noisy it is?** It is told, as a number. That number, the guidance strength and one
# vector of the text are added up, and the sum sets three knobs in every block: shift, scale and gate. You will
# build the whole of it, put it into the trained model, give the model a wrong clock and turn the knobs off.
#
# Afterwards you can say what a time looks like inside, write AdaLN from memory, and tell what the pooled text
# decides and what it does not.
#
# 65 minutes · needs notebook 00

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.models.modulation import timestep_embedding
from fluxedu.models.modulation import ShiftScaleGate

device = course.begin()
pipe = fe.load(device=device)
flux = pipe.flux
prompt, other = "a red circle on a white background", "a blue star on a black background"
picture = pipe(prompt, seed=4, progress=False)
times = picture.trajectory.times[:-1].to(device)  # [20], from 1 (noise) down
course.where(pipe, "vec", "double", "single", "final")

# %% [markdown]
# `vec` is one vector a picture. No token ever meets it. It acts through the blocks' modulation, and you will see by
# the end how much of the network is there for nothing else.
#
# ## Predict

# %%
share = fe.predict("which percent of FLUX.1-dev's parameters only make shifts, scales and gates?", 27)  # answer
knob = fe.predict("0 in every block: which moves the velocity most? shift / scale / gate", "gate")  # answer
words = fe.predict("all three 0 and T5's words exchanged: nothing / a little / much changes", "nothing")  # answer
colour = fe.predict("T5 reads of a red circle, CLIP of a blue star: which colour is drawn?", "red")  # answer

# %% [markdown]
# ## Build it
#
# A single number is a poor input: a linear layer can only make it larger or smaller. So it is read off on many waves
# of different speeds, as a time of day is on the hands of a clock.

# %% exercise="modulation.waves"
# The guidance strength goes through the same waves, times 1000 as well.

# %%
if passed:
    mine = waves(times.cpu(), 256)
    error = (mine - timestep_embedding(times.cpu())).abs().max()
    print("largest difference from the library's below 1 in 1,000:", bool(error < 1e-3))

table = timestep_embedding(torch.linspace(1, 0, 701))[:, 20:128].T  # the cosines, without the 20 fastest
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
shown = ax.imshow(table, aspect="auto", cmap="cividis", extent=(1, 0, 128, 20), interpolation="nearest")
ax.set(xlabel="time t (1 is noise)", ylabel="number of the wave")
ax.set_title("Fast waves tell neighbouring times apart, slow ones early from late")
fig.colorbar(shown, label="cosine")
plt.show()

# %% [markdown]
# `1000 t` is a real number, not the index of a step. A time that was kept in bfloat16 is off by whole units, so our
# waves are always made of a time in float32:

# %%
t = torch.tensor(0.90453)
print("exact:", round(1000 * float(t), 2), "· time kept in bfloat16:", int(t.bfloat16() * 1000))

# %% [markdown]
# The waves, and CLIP's pooled vector, are brought to the network's width by the same kind of small module.

# %% exercise="modulation.embedder"

# %%
embedder_done = bool(passed)
strength = torch.tensor([pipe.defaults.guidance], device=device)
text = {said: pipe.prompt_encoder([said]) for said in (prompt, other)}
with torch.no_grad():
    parts = {
        "time": flux.time_in(timestep_embedding(times).to(pipe.dtype)),  # [20, D]
        "guidance": flux.guidance_in(timestep_embedding(strength).to(pipe.dtype)),  # [1, D]
        "pooled text": flux.vector_in(text[prompt].pooled),  # [1, D]
    }
    vec = sum(parts.values())  # [20, D]
    plan = flux.plan(times[:, None], strength, text[prompt].pooled)
print("vec, a row a step:", list(vec.shape))
print("the library's is the same to 1 in 100,000:", bool((vec - plan.vec[:, 0]).norm() / vec.norm() < 1e-5))
print("guidance is an input of:", *(v for v in ("dev", "schnell") if fe.models.FluxConfig.variant(v).guidance_embed))

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for (name, part), look in zip(parts.items(), (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))):
    size = part.float().norm(dim=-1).expand(len(times))
    ax.plot(times.cpu(), size.cpu(), color=look[0], linestyle=look[1], label=name)
ax.set(xlabel="time t (1 is noise)", ylabel="length of the vector", xlim=(1, 0), ylim=(0, None))
ax.set_title("Of the three summands of vec, only the time's changes in a run")
ax.legend()
plt.show()

# %% [markdown]
# FLUX.1-schnell has no guidance input: the summand is missing, and its `vec` is time plus text. Note what is *not* in
# it: no token of the picture, and no image embedding.
#
# ## Three knobs
#
# Each block has a linear layer from `silu(vec)` to its knobs. A double-stream block has one for each stream, and each
# serves two layers, the attention and the MLP: six vectors. A single-stream block has three.

# %% exercise="modulation.modulation"

# %%
modulation_done = bool(passed)
dim = flux.config.hidden_size
print("D =", dim)
print("double block, a stream:", flux.double_blocks[0].img_mod.lin.out_features // dim, "vectors of D numbers")
print("single block:          ", flux.single_blocks[0].modulation.lin.out_features // dim)
print("read in a single block:", list(flux.single_blocks[0].linear1.weight.shape), "= [3 D for q k v + 4 D, D]")

# %% [markdown]
# Why *adaptive*? An ordinary LayerNorm learns one scale and one shift for every channel, and they are fixed for good. The
# LayerNorm inside a FLUX block has none of its own; what takes their place is computed anew for every prompt and time.

# %%
ordinary = sum(p.numel() for p in torch.nn.LayerNorm(dim).parameters())
learned = sorted({name.split(".")[0] for name, _ in flux.single_blocks[0].named_parameters()})
print("an ordinary LayerNorm learns", ordinary, "numbers, for all prompts and times")
print("what is learned in a single block:", *learned, "(norm is that of q and k)")
scales = {}
with torch.no_grad():
    for said in (prompt, other):
        knobs = flux.plan(times[:, None], strength, text[said].pooled).single[0]  # [20, 1, 3 D]: shift, scale, gate
        scales[said] = knobs[:, 0, dim : 2 * dim]  # [20, D]
at_first, at_last = scales[prompt][0], scales[prompt][-1]
print("its scale is another at another time:", bool((at_first - at_last).norm() > 0.1 * at_first.norm()))
print("                and for another prompt:", not torch.equal(scales[prompt], scales[other]))

# %% [markdown]
# The idea is older than FLUX and has many names (conditional normalisation in GLIDE, arXiv 2112.10741, and StyleGAN-T,
# arXiv 2301.09515); FLUX's form, with a gate, is DiT's AdaLN-Zero (arXiv 2212.09748).
#
# **A common mistake.** Some descriptions of FLUX say that a single-stream block computes no modulation for its MLP. There is no *second* one. The three vectors that are there act on both: one
# shifted and scaled token goes into `linear1`, whose output feeds attention and MLP, and one gate multiplies what
# both add. Some also say that the parameters come from the input tensor. They come from `vec`. Two different
# noises give the same knobs, to the last bit:

# %%
with fe.record("double.0.img_mod.scale1", "single.2.gate", "single.2.x") as rec:
    pipe(prompt, seed=[4, 5], steps=3, progress=False)
for site in rec:
    first, second = (value.tensor for when, value in rec.entries(site) if when.step == 1)
    print(f"{site:24} the same for both pictures: {torch.equal(first, second)}")

# %% [markdown]
# Now the step itself. `shift` and `scale` prepare what a layer reads; `gate` decides how much of its answer is added.

# %% exercise="modulation.adaln"

# %% [markdown]
# It says plus, and no blend: the gate can be larger than 1 or below 0, and nothing of `x` is taken away for it. Try
# yours on a block of the trained network, with what the block itself computed as the layer's answer:

# %%
gates = torch.stack(plan.single)[..., 2 * dim :]  # [6 blocks, 20 steps, 1, D]
print("gates of the single blocks go below 0:", bool(gates.min() < 0), "· and above 1:", bool(gates.max() > 1))

names = ("x", "shift", "scale", "gate", "modulated", "added", "out")
with fe.record(*(f"single.3.{name}" for name in names), steps=8) as rec:
    pipe(prompt, seed=4, progress=False)
got = {name: rec[f"single.3.{name}"].tensor[0][None] for name in names}  # tokens [1, 96, D], the knobs [1, D]
print("tokens:", list(got["x"].shape), "· gate:", list(got["gate"].shape))
if passed:
    reads = []
    out = adaln(got["x"], lambda y: reads.append(y) or got["added"], got["shift"], got["scale"], got["gate"])
    for name, mine in (("modulated", reads[0]), ("out", out)):
        print(f"{name}: as in the block to 1 in 100,000:", bool((mine - got[name]).norm() / mine.norm() < 1e-5))

# %% [markdown]
# With gate 0 a block is the identity. Networks of this kind are often begun so: every modulation's last layer
# starts at zero, so the untrained network hands its tokens through, and each block comes in as it has
# something to say (AdaLN-**Zero**, DiT). How FLUX.1 was begun has not been published.


# %%
def zero(value, ctx):
    return 0 * value


with fe.record("single.3.x", "single.3.out", steps=8) as rec, fe.intervene("single.3.gate", zero):
    pipe(prompt, seed=4, progress=False)
print("gate 0: what goes in comes out:", torch.equal(rec["single.3.x"].tensor, rec["single.3.out"].tensor))

# %% [markdown]
# ## Once, before the first step
#
# `vec` knows neither the picture nor the words, so the knobs of all steps can be made ahead of the loop, and
# `flux.plan` does that. In FLUX.1 it matters: count the layers that do only this.

# %%
from fluxedu.models.meta_init import meta_init

with meta_init():  # shapes only, no numbers
    dev = fe.models.Flux(fe.models.FluxConfig.variant("dev"))
knobs = sum(p.numel() for name, p in dev.named_parameters() if "_mod.lin" in name or "modulation.lin" in name)
total = sum(p.numel() for p in dev.parameters())
print(f"FLUX.1-dev: {knobs:,} of {total:,} parameters")
share.against(round(100 * knobs / total))
print("in bfloat16 that is", round(2 * knobs / 1e9, 1), "GB, used once a step on a single vector")

with torch.no_grad():
    eighth = flux.plan(times[8:9], strength, text[prompt].pooled)
same = (eighth.single[3] - plan.single[3][8]).norm() / eighth.single[3].norm()
print("step 8 planned alone or with the run, the same to 1 in 100,000:", bool(same < 1e-5))

# %% [markdown]
# Once a plan is made, these layers need not be on the GPU any more.
#
# ## See it

# %%
fig = fe.plots.modulation(fe.instruments.lenses.modulation(pipe, prompt))
fig.suptitle("The knobs move with the time, and not alike in every block")
fig

# %% [markdown]
# And channel by channel. Move the guidance: does it turn the knobs much? Change the prompt: the pooled text turns them
# as well. Point at a layer and time in the left picture.

# %%
widgets.modulation(pipe, [prompt, other])

# %% [markdown]
# ## Put yours into the trained model
#
# Four modulations in double blocks, six in single blocks, three embedders: all of them yours.

# %%
if embedder_done and modulation_done:
    with (
        fe.swap("double.*_mod", Modulation, pipe.flux),
        fe.swap("single.*.modulation", Modulation, pipe.flux),
        fe.swap("time_in", MLPEmbedder, pipe.flux),
        fe.swap("guidance_in", MLPEmbedder, pipe.flux),
        fe.swap("vector_in", MLPEmbedder, pipe.flux),
    ):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it: a wrong clock
#
# Only what the network is *told* changes. Can it see for itself how noisy its input is? If it went by its eyes alone,
# the six pictures would be alike.


# %%
def told(clock):
    """A change of `vec.time` that tells the network `clock(t)` instead of the time t."""
    return lambda part, ctx: flux.time_in(timestep_embedding(torch.tensor([clock(ctx.time)], device=device)).to(part))


clocks = {
    "the right time": told(lambda t: t),
    "0.1 too noisy": told(lambda t: min(1.0, t + 0.1)),
    "0.1 too clean": told(lambda t: max(0.0, t - 0.1)),
    "always 1, noise": told(lambda t: 1.0),
    "always 0.5": told(lambda t: 0.5),
    "always 0, picture": told(lambda t: 0.0),
}
fig, axes = plt.subplots(1, len(clocks), figsize=(10, 2.3), layout="constrained")
for ax, (name, change) in zip(axes, clocks.items()):
    with fe.intervene("vec.time", change):
        out = pipe(prompt, seed=4, progress=False)
    far = (out.latents - picture.latents).norm() / picture.latents.norm()
    print(f"told {name:18}", "the latent stays the same" if far < 1e-3 else f"the latent moves by {far:.0%}")
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Told a time 0.1 off, nearly the same picture; told one fixed time, a wrong one")
plt.show()

# %% [markdown]
# So it believes what it is told. An error of 0.1 it survives; a clock that stands still it does not.
#
# ## Break it: the knobs
#
# One state of the run, step 8. First one kind of knob at a time.

# %%
from fluxedu.sampling.latents import image_ids, pack, text_ids

x = pack(picture.trajectory.latents[8]).to(device)
ids = image_ids(*picture.latents.shape[-2:]).to(device), text_ids(text[prompt].txt.shape[1]).to(device)


@torch.no_grad()
def velocity(t5=prompt, clip=prompt, t=None):
    """The network's answer at step 8, with T5's words of one prompt and CLIP's vector of another."""
    clock = times[8:9] if t is None else torch.tensor([t], device=device)
    return flux(x, ids[0], text[t5].txt, ids[1], clock, text[clip].pooled, strength)


def distance(a, b):
    return float((a - b).norm() / b.norm())


base = velocity()
moved = {}
for kind in ("shift", "scale", "gate"):
    with fe.intervene(f"double.*_mod.{kind}?", f"single.*.{kind}", zero):
        moved[kind] = distance(velocity(), base)
print({kind: f"{move:.1f} times the velocity" for kind, move in moved.items()})
knob.against(max(moved, key=moved.get))

# %% [markdown]
# Without gates no block adds anything; what is left is `img_in` and the last layer. Without shifts or scales the blocks
# still speak, but about tokens they were not trained on.
#
# Now all three at once. The image tokens cannot hear the text tokens any more, so the words must be without effect. But
# the last layer has a shift and a scale of its own, made from `vec`:

# %%
with fe.intervene("double.*_mod.*", "single.*.shift", "single.*.scale", "single.*.gate", zero):
    bare = velocity()
    moves = {"T5's words": distance(velocity(t5=other), bare)}
    moves["CLIP's vector"] = distance(velocity(clip=other), bare)
    moves["the time"] = distance(velocity(t=0.3), bare)
for name, move in moves.items():
    print(f"exchange {name:14}", "nothing at all" if move == 0 else "changes the velocity")
words.against("nothing" if moves["T5's words"] < 1e-6 else "a little" if moves["T5's words"] < 0.1 else "much")

# %% [markdown]
# ## Break it: two texts at once
#
# T5 reads one prompt, CLIP another. The judge, which comes with the miniature and reads pictures by geometry, says what
# was drawn.

# %%
from fluxedu.nano.judge import read

fig, axes = plt.subplots(2, 2, figsize=(4.4, 4.6), layout="constrained")
drawn, short = {}, {prompt: "red circle", other: "blue star "}
for row, t5 in enumerate((prompt, other)):
    for column, clip in enumerate((prompt, other)):
        with fe.intervene("sample.pooled", lambda pooled, ctx: text[clip].pooled.to(pooled)):
            out = pipe(t5, seed=4, progress=False)
        seen = read(np.asarray(out.images[0]))
        thing = next((f"{thing.color} {thing.form}" for thing in seen.things), "nothing")
        drawn[row, column] = thing.split()[0]
        print(f"T5 {short[t5]} · CLIP {short[clip]} -> {thing}, {seen.background}")
        axes[row, column].imshow(out.images[0])
        axes[row, column].set(xticks=[], yticks=[])
for i, name in enumerate(("red circle", "blue star")):
    axes[0, i].set_title(f"CLIP: {name}", fontsize=9)
    axes[i, 0].set_ylabel(f"T5: {name}", fontsize=9)
fig.suptitle("T5 decides what is drawn", fontsize=11)
plt.show()
colour.against(drawn[0, 1])

# %% [markdown]
# In the miniature the pooled vector is a nudge, even where the words leave something open. Try `a red circle` with CLIP
# reading “… on a white background”: the picture may shift, but it does not obey. What it does in the large model has been studied in arXiv 2602.09268.
#
# ## In five lines
#
# 1. A time is read off on 128 waves, cosines first, as `1000 t` in float32; guidance likewise.
# 2. `vec` = time + guidance + pooled text; schnell has no guidance.
# 3. `lin(silu(vec))` gives shift, scale and gate: six vectors for a stream of a double block, three for a single block.
# 4. `x + gate * layer((1 + scale) * LN(x) + shift)`: a sum, no blend; LN has no weights, eps 1e-6.
# 5. All of it is known before the first step, and it is more than a quarter of the weights.
#
# **People ask**: *is the guidance number classifier-free guidance?* (flux issues 63, 159) No: it is an input of `vec`,
# learned by distillation; one pass of the network a step. Notebook 12 compares the two. *Is CLIP's vector pooled?*
# (flux issue 64) Yes, one vector a prompt, and this notebook is all that happens to it. *I run out of memory* (flux
# issues 185, 7): the modulation layers are a part that can leave the GPU before the loop begins.
#
# **Read**: DiT, arXiv 2212.09748 (AdaLN-Zero) · `black-forest-labs/flux`, `modules/layers.py` (`timestep_embedding`,
# `MLPEmbedder`, `Modulation`, `LastLayer`) · ours: `fluxedu/models/modulation.py` and `fluxedu/models/modulation.py`.
# A trap when you convert weights: diffusers stores the last layer's two as (scale, shift), BFL as (shift, scale).

# %%
fe.score()
