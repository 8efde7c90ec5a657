# %% [markdown]
# # 05b · Modulation
#
# **How do the time, the guidance scale and the text act on every block?** Each block computes three vectors from `vec`:
# shift, scale and gate. This is called *modulation*, and it takes a large share of FLUX.1-dev's parameters. You will
# build it, put it into the trained model, and switch parts of it off.
#
# Afterwards you can write AdaLN (LayerNorm with a computed shift and scale) from memory, explain why the modulation can
# be computed before sampling, and say what the image takes from the pooled text vector here.
#
# 60 minutes · needs notebook 05

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.course import evidence
from fluxedu.models.modulation import ShiftScaleGate

device = course.begin()
pipe = fe.load(device=device)
flux = pipe.flux
prompt, other = "a red circle on a white background", "a blue star on a black background"
reference = pipe(prompt, seed=4, progress=False)
times = reference.trajectory.times[:-1].to(device)  # [20], from 1 (noise) down
course.where(pipe, "double", "single", "final")

# %% [markdown]
# `vec` is the sum of three embeddings: of the time, the guidance scale and CLIP's pooled vector of the prompt.
#
# ## Predict
#
# For the second and third question, we set one or all of shift, scale and gate to 0 in all blocks and measure how much
# the *velocity* (the network's output) changes; a change below 10 % counts as 'a little'. In the fourth, the gates of
# one block are 0, so that it does nothing.

# %%
modulation_share = fe.predict(
    "What percentage of FLUX.1-dev's parameters compute the shifts, scales and gates of its blocks?", 27
)  # answer
largest_effect = fe.predict(
    "Which of the three changes the velocity most when it is set to 0: 'shift', 'scale' or 'gate'?", "gate"
)  # answer
t5_effect = fe.predict(
    "With all three at 0, how much does another T5 prompt change the velocity: 'not', 'a little' or 'much'?", "not"
)  # answer
least_needed = fe.predict("Which block is needed least: 'double.0', 'single.2' or 'single.4'?", "single.4")  # answer

# %% [markdown]
# ## Shift, scale and gate
#
# Each block has linear layers that compute its modulation from `silu(vec)`. A double-stream block has one for each of
# its two streams (text and image). Each stream has an attention and an MLP, so this layer computes six vectors. A
# single-stream block has one linear layer, which computes three.

# %% exercise="modulation.modulation"

# %% [markdown]
# Now the modulated layer itself. `shift` $b$ and `scale` $s$ change the input of the layer $f$ (an attention or an
# MLP); `gate` $\gamma$ multiplies its output before it is added. All three have one number per channel:
#
# $$x' = x + \gamma \odot f\big((1 + s) \odot \mathrm{LN}(x) + b\big) \qquad
# \mathrm{LN}(x) = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + 10^{-6}}}$$
#
# If the modulation layer outputs $s = 0$ and $b = 0$, the result is the plain LayerNorm. This is *adaptive*
# LayerNorm, AdaLN: an ordinary LayerNorm learns one scale and one shift per channel, the same for all inputs. The one
# in FLUX has no weights; its scale and shift are computed for every prompt and time. FLUX's version, with a gate,
# has the form of DiT's AdaLN-Zero (arXiv 2212.09748).

# %% exercise="modulation.adaln"

# %% [markdown]
# The gated output is added to `x`; it does not replace a part of `x`. A gate can be larger than 1 or below 0. Test your
# function on a block of the trained network, with the values that the block itself computed (`fe.record` stores the
# values at *sites*, which are named points inside the model):

# %%
names = ("x", "shift", "scale", "gate", "modulated", "added", "out")
with fe.record(*(f"single.3.{name}" for name in names), steps=8) as rec:
    pipe(prompt, seed=4, progress=False)
values = {name: rec[f"single.3.{name}"].tensor[0][None] for name in names}  # tokens [1, 96, D], modulation [1, D]
print(f"{values['gate'].numel()} gates, {values['gate'].min():.1f} to {values['gate'].max():.1f}, for all 96 tokens")
if fe.passed("modulation.adaln"):
    inputs = []

    def layer(y):
        inputs.append(y)
        return values["added"]

    out = adaln(values["x"], layer, values["shift"], values["scale"], values["gate"])
    course.compare("modulated tokens, yours and the block's", inputs[0], values["modulated"])
    course.compare("output, yours and the block's", out, values["out"])

# %% [markdown]
# **Two common mistakes.** Some descriptions of FLUX say that a single-stream block computes no modulation for its MLP.
# There is no *second* modulation, but the one it has acts on both: `linear1` feeds attention and MLP, and one gate
# multiplies the sum of what both add. Others say that the modulation is computed from the input tokens. It is computed
# from `vec`, so two images with different noise have the same modulation, to the last bit. (`rec.entries(site)` lists
# pairs of `when` and a value, one for each image and step; `when.step` is the step.)

# %%
print("linear1 of a single block:", list(flux.single_blocks[0].linear1.weight.shape), "= [3 D for q k v + 4 D, D]")
with fe.record("double.0.img_mod.scale1", "single.2.gate", "single.2.x") as rec:
    pipe(prompt, seed=[4, 5], steps=3, progress=False)
for site in rec:
    first, second = (value.tensor for when, value in rec.entries(site) if when.step == 1)
    print(f"{site:24} relative difference of the two images: {float((first - second).norm() / first.norm()):.1g}")

# %% [markdown]
# ## A closed gate
#
# With gate 0 a block is the identity, and so is its derivative:
#
# $$\frac{\partial x'}{\partial x} = I + \mathrm{diag}(\gamma)\, J = I \quad \text{for} \quad \gamma = 0$$
#
# where $J$ is the derivative of $f((1 + s) \odot \mathrm{LN}(x) + b)$ with respect to $x$. Gradients then pass
# unchanged through any number of blocks. Networks of this kind are often initialised in this way: the linear layer of
# every modulation starts at zero, so that each block contributes only what it learns (AdaLN-**Zero**). How FLUX.1 was
# initialised has not been published.

# %% exercise="modulation.gates"
# `fe.intervene` calls such a function at every site that matches its patterns, and the model continues with the result.

# %%
gate_sites = ("double.*_mod.gate?", "single.*.gate")
if fe.passed("modulation.gates"):
    fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.3), layout="constrained")
    for ax, closed in zip(axes, ("none", "single.4", "single.2", "double.0")):
        blocks = [] if closed == "none" else [closed]
        with fe.intervene(*gate_sites, close_gates(blocks)), fe.record("single.2.x", "single.2.out", steps=8) as rec:
            out = pipe(prompt, seed=4, progress=False)
        added = float((rec["single.2.out"].tensor - rec["single.2.x"].tensor).abs().max())
        change = float((out.latents - reference.latents).norm() / reference.latents.norm())
        print(f"closed: {closed:9} single.2 changes numbers by up to {added:3.0f}; the latent changes by {change:.0%}")
        ax.imshow(out.images[0])
        ax.set(title=f"closed: {closed}", xticks=[], yticks=[])
    plt.show()

# %% [markdown]
# Without which block does the model still work? The *judge*, a program of this course that recognises shapes and
# colours, has looked at 40 scenes of two shapes, with the gates of one block closed (shares with 95 % intervals). The
# control is another seed with all blocks open.

# %%
removed = evidence.load("blocks")["removed"]
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
evidence.plot(ax, {name: row["everything right"] for name, row in removed.items()}, color="#0072B2")
ax.set(
    ylabel="share of 40 images\nwith everything right",
    ylim=(-0.03, 1.03),
    title="With any block closed, fewer images are right; fewest are lost with single.4 closed",
)
ax.tick_params(axis="x", labelrotation=90)
plt.show()
for name in ("nothing", "single.4", "single.2", "double.0"):
    print(f"closed: {name:9} everything right: {evidence.percent(removed[name]['everything right'])}")
least_needed.against(
    max(("double.0", "single.2", "single.4"), key=lambda name: removed[name]["everything right"]["value"])
)

# %% [markdown]
# ## Computed before the first step
#
# `vec` does not depend on the image tokens, so the modulation of all steps can be computed before the sampling loop;
# `flux.plan` does that. In FLUX.1 this matters. A layer that computes $k$ vectors of $D$ numbers from $D$ numbers has
# $k D^2$ weights. FLUX.1 has 19 double blocks with two streams and $k = 6$, and 38 single blocks with $k = 3$:
#
# $$19 \cdot 2 \cdot 6\, D^2 + 38 \cdot 3\, D^2 = 342\, D^2 \approx 3.2 \text{ billion} \quad \text{for} \quad D = 3072$$
#
# Counted, with the biases:

# %%
from fluxedu.models.meta_init import meta_init

with meta_init():  # shapes only, no weights
    dev = fe.models.Flux(fe.models.FluxConfig.variant("dev"))
modulation_size = sum(p.numel() for name, p in dev.named_parameters() if "_mod.lin" in name or "modulation.lin" in name)
total = sum(p.numel() for p in dev.parameters())
print(f"FLUX.1-dev: {modulation_size:,} of {total:,} parameters")
modulation_share.against(round(100 * modulation_size / total))
print("in bfloat16 that is", round(2 * modulation_size / 1e9, 1), "GB, used once per step on a single vector")

guidance = torch.tensor([pipe.defaults.guidance], device=device)
text = {p: pipe.prompt_encoder([p]) for p in (prompt, other)}
with torch.no_grad():
    plan = flux.plan(times[:, None], guidance, text[prompt].pooled)  # all 20 steps at once
    step_8 = flux.plan(times[8:9], guidance, text[prompt].pooled)
course.compare("the modulation of step 8, computed alone and among 20", step_8.single[3], plan.single[3][8])

# %% [markdown]
# Once the modulation of all steps is computed, these layers can be moved off the GPU. This helps users without enough
# memory (flux issues 7 and 185).
#
# ## See it
#
# A *lens* is a function of `fluxedu.instruments.lenses` that runs the model and measures one quantity. Here it is the
# size (root mean square over channels) of shift, scale and gate: yellow is large, dark violet is 0.

# %%
fig = fe.plots.modulation(fe.instruments.lenses.modulation(pipe, prompt))
fig.suptitle("Root mean square of shift, scale and gate: it changes with the time, differently in each block")
fig

# %% [markdown]
# The explorer shows every layer, and some channels of the chosen one. Point at a layer and a time in the left panel.
# Change the guidance scale, then the prompt: how much does the modulation change?

# %%
widgets.modulation(pipe, [prompt, other])

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules by yours, with the trained weights: the modulations of all blocks.

# %%
if fe.passed("modulation.modulation"):
    with fe.swap("double.*_mod", Modulation, flux), fe.swap("single.*.modulation", Modulation, flux):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your code and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it: the modulation
#
# We take the states of 40 short runs (5 prompts, 8 seeds each), and first set one of shift, scale and gate to zero.

# %%
from fluxedu.sampling.latents import image_ids, pack, text_ids

five = [prompt, other, "a green square left of a yellow ring", "an orange triangle", "a cyan star above a pink cross"]
prompts = [p for p in five for _ in range(8)]
runs = pipe(prompts, seed=list(range(8)) * 5, steps=4, progress=False)
x, t = pack(runs.trajectory.latents[2]).to(device), runs.trajectory.times[2].to(device)
encoded = pipe.prompt_encoder(prompts)
img_ids, txt_ids = image_ids(*runs.latents.shape[-2:]).to(device), text_ids(encoded.txt.shape[1]).to(device)


@torch.no_grad()
def velocity(txt=encoded.txt, pooled=encoded.pooled, t=t):
    """The velocity of the 40 states, `[40, N, 64]`."""
    return flux(x, img_ids, txt, txt_ids, t.expand(40), pooled, guidance.expand(40))


def relative_differences(a, b):
    """The smallest, median and largest relative difference of the 40 velocities."""
    differences = sorted(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).tolist())
    return differences[0], differences[20], differences[-1]


def zero(value, ctx):
    return 0 * value


unchanged, changes = velocity(), {}
for kind in ("shift", "scale", "gate"):
    with fe.intervene(f"double.*_mod.{kind}?", f"single.*.{kind}", zero):
        changes[kind] = relative_differences(velocity(), unchanged)
for kind, (low, middle, high) in changes.items():
    print(f"all {kind}s 0: the velocity changes by {middle:.0%} ({low:.0%} to {high:.0%})")
largest_effect.against(max(changes, key=lambda kind: changes[kind][1]))

# %% [markdown]
# Without gates no block adds anything; only the first layer, `img_in`, and the last layer are left. Without shifts or
# scales the blocks still work, but on inputs that they were not trained on. Now set all three to zero, so that no block
# passes anything from text tokens to image tokens. But the last layer has its own shift and scale, computed from `vec`:

# %%
with fe.intervene("double.*_mod.*", "single.*.shift", "single.*.scale", "single.*.gate", zero):
    unmodulated = velocity()
    changes = {"T5's vectors": relative_differences(velocity(txt=encoded.txt.roll(8, 0)), unmodulated)}
    changes["CLIP's vector"] = relative_differences(velocity(pooled=encoded.pooled.roll(8, 0)), unmodulated)
    changes["the time"] = relative_differences(velocity(t=torch.full_like(t, 0.3)), unmodulated)
for name, (low, middle, high) in changes.items():
    print(f"exchanging {name:14} changes the velocity by {middle:.1%} ({low:.1%} to {high:.1%})")
by_t5 = changes["T5's vectors"][-1]
t5_effect.against("not" if by_t5 < 1e-6 else "a little" if by_t5 < 0.1 else "much")

# %% [markdown]
# ## Break it: two prompts
#
# You saw in notebook 02 that T5's prompt is drawn if CLIP gets another one; here with two other prompts.

# %%
from fluxedu.nano.judge import detect

fig, axes = plt.subplots(1, 2, figsize=(4.4, 2.6), layout="constrained")
for ax, t5, clip in zip(axes, (prompt, other), (other, prompt)):
    with fe.intervene("sample.pooled", lambda pooled, ctx: text[clip].pooled.to(pooled)):
        image = pipe(t5, seed=4, progress=False).images[0]
    drawn = " and ".join(f"{o.color} {o.form}" for o in detect(np.asarray(image)).objects) or "nothing"
    print(f"T5: {t5} · CLIP: {clip} -> {drawn}")
    ax.imshow(image)
    ax.set(title=f"T5: {' '.join(t5.split()[1:3])}\nCLIP: {' '.join(clip.split()[1:3])}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The same with 40 pairs of scenes. T5 gets prompt A, CLIP gets prompt B. The judge checks 5 claims of each prompt: two
# colours, two shapes, a relation. Control: both encoders get A; some claims of B are then true by chance. Claims about
# one image are not independent, so the true intervals are wider than those in brackets.

# %%
for whose, entry in evidence.load("pooled")["claims that hold"].items():
    print(f"{whose:44} true: {evidence.percent(entry)}")

# %% [markdown]
# In the miniature, what is drawn follows T5's prompt: CLIP's claims are true about as often as by chance. What the
# pooled vector does in the large model has been studied in arXiv 2602.09268. Try a prompt that leaves something open:
# give T5 `a red circle`, and CLIP the same with “… on a white background”.
#
# ## In five lines
#
# 1. `lin(silu(vec))` gives shift, scale and gate: six vectors per stream of a double block, three for a single block.
# 2. `x + gate * layer((1 + scale) * LN(x) + shift)`: the gated output is added; LN has no weights, and eps is 1e-6.
# 3. With gate 0 a block is the identity.
# 4. The modulation depends on `vec` alone, so it is the same for all tokens of a stream and can be computed before the
#    first step.
# 5. The layers that compute it have 27 % of FLUX.1-dev's parameters.
#
# **Questions people ask**: *Is this idea new?* No: conditional normalisation is also in AdaIN (arXiv 1703.06868)
# and GLIDE (arXiv 2112.10741).
#
# **Read**: DiT, arXiv 2212.09748 (AdaLN-Zero) · `black-forest-labs/flux`, `modules/layers.py` (`Modulation`,
# `LastLayer`) · ours: `fluxedu/models/modulation.py`. Take care when you convert weights: the last layer's modulation
# is stored as (scale, shift) by diffusers, and as (shift, scale) by BFL.

# %%
fe.score()
