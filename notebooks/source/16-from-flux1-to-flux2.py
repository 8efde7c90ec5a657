# %% [markdown]
# # 16 · From FLUX.1 to FLUX.2
#
# **What changed in the transformer, and why?** You will derive each change, write it, run your code inside a trained
# miniature of FLUX.2, and compare this miniature with a FLUX.1 that was trained alike.
#
# Afterwards you can turn the code of a FLUX.1 transformer into that of FLUX.2.
#
# 60 minutes · needs notebooks 04, 05b, 08 and 09

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models import (
    Flux,
    Flux2,
    Flux2Config,
    Flux2DoubleStreamBlock,
    Flux2SingleStreamBlock,
    FluxConfig,
    LastLayer,
    MLPEmbedder,
    QKNorm,
    SharedModulation,
)
from fluxedu.models.attention import rope_table, rotate, split_heads
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import layer_norm, modulate, timestep_embedding
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack

device = course.begin()
flux1, flux2 = fe.load("nano", device=device), fe.load("nano-flux2", device=device)
prompt = "a red circle left of a blue square"
original = flux2(prompt, seed=4, steps=8, progress=False)
original.images[0]

# %% [markdown]
# `flux1` is the miniature of FLUX.1 that you know. `flux2`, which drew this image, is a miniature of FLUX.2 of about
# the same size, trained on the same scenes, but for a shorter time (so its circle is not round).
# Published are FLUX.2 **dev** (32 B parameters) and **klein** (4 B and 9 B). The table lists what has changed; notebook
# 16b treats its last row.
#
# | | FLUX.1 | FLUX.2 |
# |---|---|---|
# | modulation | a layer in each block and stream | three layers, shared by all blocks |
# | pooled text vector | from CLIP, part of `vec` | none |
# | MLP | GELU | SwiGLU |
# | biases | in every linear layer | none |
# | position ids | (frame, row, column), all 0 for text | (image, row, column, text index) |
# | text | T5 | a language model: Mistral in dev, Qwen3 in klein |
# | latents, schedule | 16 channels, one scale and shift | 32 channels, a batch norm, another schedule |
#
# The miniature reads T5's vectors in place of a language model's, and has FLUX.1's latents and schedule. All else is as
# in the table.
#
# ## Predict

# %%
modulation_share = fe.predict(
    "What percentage of klein's (4 B) parameters computes shifts, scales and gates?", 4.1
)  # answer
million_biases = fe.predict("How many million of FLUX.1-dev's 11,901 million parameters are biases?", 3.2)  # answer
order_matters = fe.predict(
    "You exchange text tokens; the position ids stay as they are. Does the velocity change in FLUX.1, and in FLUX.2? "
    "'yes' or 'no' for each",
    "no, yes",
)  # answer

# %% [markdown]
# ## One modulation for all blocks
#
# In FLUX.1, each block $l$ has a layer that computes its own shift $b_l$ and scale $s_l$ from `vec` (notebook 05b).
# These layers are 27 % of the weights (notebook 09b). Why might one need them per block? Look at what the block's first
# weight $W_l$ makes of them:
#
# $$W_l \big((1 + s_l(t)) \odot \mathrm{LN}(x) + b_l(t)\big)$$
#
# If $1 + s_l(t) = a_l \odot (1 + s(t))$ and $b_l(t) = a_l \odot b(t)$, with $s$ and $b$ shared by all blocks, then the
# constants $a_l$ can be part of the weight: $W_l \,\mathrm{diag}(a_l)$ instead of $W_l$. So blocks that share their
# modulation can still use their inputs with different strength. The gate's constants can be part of $W_2$. What the
# blocks lose is a *time course of their own*: no gate can open earlier than the others of its kind. FLUX.2 accepts this
# and has three such layers, $15 D^2$ weights in all: for the image stream and the text stream of the double blocks ($6
# D^2$ each), and for the single blocks ($3 D^2$).

# %%
with meta_init():  # names and shapes only
    dev, klein = Flux(FluxConfig.variant("dev")), Flux2(Flux2Config.variant("klein-4b"))
total = sum(p.numel() for p in klein.parameters())
shared = sum(p.numel() for name, p in klein.named_parameters() if "odulation" in name)  # the last layer's as well
D, depth, depth_single = klein.config.hidden_size, klein.config.depth, klein.config.depth_single_blocks
own = shared + (12 * depth + 3 * depth_single - 15) * D**2
print(f"klein: {total / 1e6:,.0f} million parameters, {shared / 1e6:.0f} million of them for the modulation")
print(f"with layers of their own in all blocks, these would be {own / 1e6:,.0f} million")
modulation_share.against(100 * shared / total)

# %% [markdown]
# ## No pooled vector
#
# In FLUX.1, $\text{vec} = E_\text{time}(t) + E_\text{guidance}(g) + E_\text{text}(y)$, with CLIP's pooled vector $y$
# (notebook 09). FLUX.2 leaves out the last term, and klein has no guidance input either, so $\text{vec} =
# E_\text{time}(t)$. What one saves is a whole text encoder. The price: the prompt reaches the patches through attention
# alone. And the modulation becomes the same for all prompts. In the explorer, switch between the two prompts: nothing
# changes. All blocks of a kind have the same values, too.

# %%
fe.widgets.modulation(flux2, [prompt, "a green star"], times=9)

# %% [markdown]
# ## SwiGLU
#
# FLUX.1's MLP is $W_2\, \mathrm{GELU}(W_1 x)$: each hidden channel depends on one product of weights and input. A
# *gated linear unit* multiplies two such products. In SwiGLU (arXiv 2002.05202) one of them goes through SiLU,
# $\mathrm{silu}(z) = z\,\sigma(z)$, and scales the other:
#
# $$\mathrm{MLP}(x) = W_\text{out}\, \big(\mathrm{silu}(W_g\, x) \odot W_v\, x\big)$$
#
# So a hidden channel can be a product of two features of the input. There are three matrices instead of two: with $r D$
# hidden channels, $3 r D^2$ weights instead of $2 r D^2$. FLUX.2's MLP is narrower ($r = 3$ instead of $4$), so that
# $8 D^2$ weights become $9 D^2$. The official files store $W_g$ and $W_v$ as one matrix $W_1$, the gate first.

# %% exercise="flux2.mlp"

# %% [markdown]
# Both streams of the double blocks have such an MLP. Put yours into the trained miniature; the latent must stay the
# same.

# %%
if fe.passed("flux2.mlp"):
    with fe.swap("double.*.*_mlp", GatedMLP, flux2):
        out = flux2(prompt, seed=4, steps=8, progress=False)
    course.compare("the final latent with your MLPs and with the library's", out.latents, original.latents, 1e-3)

# %% [markdown]
# ## No biases, and the fused single block
#
# A bias adds the same vector for every input. A layer that reads a modulated input $z + b(t)$ does not need one: $W(z +
# b(t))$ contains $W\,b(t)$, a bias that depends on the time. For the other layers this does not hold; they lose
# theirs, too. What does it save? Hardly any parameters:

# %%
biases = sum(p.numel() for name, p in dev.named_parameters() if name.endswith("bias"))
million_biases.against(biases / 1e6)

# %% [markdown]
# The single block still runs attention and MLP side by side, as in notebook 08; `linear1` now has gate and value of the
# MLP behind q, k and v:
#
# $$[q, k, v, \text{gate}, \text{value}] = W_\text{in}\, y \qquad x' = x + g \odot W_\text{out}\,[\,\mathrm{attention}(q, k, v),\;
# \mathrm{silu}(\text{gate}) \odot \text{value}\,]$$
#
# where $y$ is the normalised and modulated $x$, and $g$ the gate of the modulation, not the MLP's.

# %% exercise="flux2.single"

# %%
if fe.passed("flux2.single"):
    with fe.swap("single.*", SingleBlock, flux2):
        out = flux2(prompt, seed=4, steps=8, progress=False)
    course.compare("the final latent with your blocks and with the library's", out.latents, original.latents, 1e-3)
    display(fe.plots.side_by_side(original.images[0], out.images[0], names=("library's blocks", "your single blocks")))

# %% [markdown]
# ## Text tokens with positions
#
# In FLUX.1 all text ids are 0. With $w_{ij}$ for the weights after the softmax, a token's attention output is the sum
# $\sum_j w_{ij}\, v_j$ over all tokens $j$. If the text tokens have equal positions, exchanging two of them exchanges
# two terms of this sum: nothing changes for the patches. The order of the words is known to T5 alone, which has written
# it into its vectors. In FLUX.2, each token has four ids, (image, row, column, text index), and text tokens count on
# the last. The score of two text tokens then depends on how far apart they are and in which direction, as for patches
# (notebook 04):
#
# $$q_i^\top R(j - i)\, k_j$$
#
# The price: a head's channels are divided among four axes, so rows and columns get 32 of 128 channels each instead of
# 56. The first id is 0 for the image that is drawn and 10, 20, ... for reference images. The base of the frequencies is
# $\theta = 2000$ instead of $10{,}000$.

# %% exercise="flux2.ids"

# %% [markdown]
# Exchange text tokens: the first eight vectors of the prompt in reverse order, with the ids as they are. How much does
# the velocity change, relative to its length?

# %%
g = torch.Generator().manual_seed(16)
noise, time = torch.randn(1, 64, 64, generator=g).to(device), torch.tensor([0.9], device=device)
changes = []
for name, pipe in {"FLUX.1": flux1, "FLUX.2": flux2}.items():
    axes, text = len(pipe.flux.config.axes_dim), pipe.prompt_encoder([prompt])
    exchanged = torch.cat([text.txt[:, :8].flip(1), text.txt[:, 8:]], dim=1)  # [1, L, 128]
    guidance = torch.tensor([1.0], device=device) if pipe.flux.config.guidance_embed else None
    ids = image_ids(16, 16, axes).to(device), text_ids(32, axes).to(device)
    with torch.no_grad():
        v = [pipe.flux(noise, ids[0], txt, ids[1], time, text.pooled, guidance) for txt in (text.txt, exchanged)]
    change = float((v[1] - v[0]).norm() / v[0].norm())
    changes.append("yes" if change > 1e-4 else "no")
    print(f"{name}: the velocity changes by {100 * change:.1f} % of its length, for this prompt and noise")
order_matters.against(changes)

# %% [markdown]
# ## The whole transformer
#
# Now put the parts together. As `vec` in `MyFlux` of notebook 09, the modulation is now computed once, before the
# blocks.

# %% exercise="flux2.forward"

# %% [markdown]
# Load the trained weights strictly, and draw the image with your network, your ids and your own loop: Euler's method
# (notebook 00) with classifier-free guidance (notebook 12), which needs the velocity for an empty prompt, too.

# %%
if fe.passed("flux2.ids", "flux2.forward"):
    network = MyFlux2(flux2.flux.config).to(device, flux2.dtype)
    print(network.load_state_dict(flux2.flux.state_dict(), strict=True))
    texts = flux2.prompt_encoder(["", prompt]).txt  # [2, L, 128]
    ids, times = position_ids(32, 8, 8).to(device), original.trajectory.times
    x = fe.sampling.draw_noise(4, 16, 16, 16).to(device)
    with torch.no_grad():
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
            batch, time = pack(x).repeat(2, 1, 1), torch.full((2,), t, device=device)
            empty, prompted = network(batch, ids[32:], texts, ids[:32], time).chunk(2)
            velocity = empty + flux2.defaults.guidance * (prompted - empty)
            x = x + (t_next - t) * unpack(velocity, 16, 16)
    course.compare("the final latent of your network and of the library's pipeline", x, original.latents, 1e-3)

# %% [markdown]
# ## What each change does
#
# Whether a change helps, only training can tell, of models that differ in it alone (notebook 07b). The *control* is a
# small FLUX.1; the others are the same model with one change each, and FLUX.2, which also has no biases and four equal
# axes. All are trained alike: the same scenes, encoders and autoencoder, about as many parameters
# and as much computing time, so slower models take fewer steps. Each draws 500 prompts that training has not shown; the
# judge of notebook 15 checks every *claim* of a prompt, such as a colour.

# %%
LABELS = {"flux2": "all changes (FLUX.2)", "flux2-modulation": "shared modulation only", "flux2-positions":
          "text positions only", "flux2-no-pooled": "no pooled vector only", "flux2-swiglu": "SwiGLU only"}  # fmt: skip
runs = evidence.load("flux2")["runs"] if "flux2" in evidence.names() else {}
missing = [label for name, label in LABELS.items() if name not in runs]
for name, run in runs.items():
    label = LABELS.get(name, "control (FLUX.1)")
    print(f"{label:24} {run['parameters']:,} parameters, {run['steps']:,} steps;",
          "everything right:", evidence.percent(run["right"]["everything"]))  # fmt: skip
print("not trained yet:", ", ".join(missing) or "none")

# %% [markdown]
# A 95 % interval here says how far other prompts would move a number, not how far another training run of the same
# recipe would. In the figure, left of 0 a model is worse than the control. A point is filled if its interval does not
# contain 0. Two runs of the *same* recipe may differ like that, too; how often is not measured.

# %%
compared = {name: run["minus twin"] for name, run in runs.items() if "minus twin" in run}
rows = ["colours", "shapes", "letter", "sizes", "relations", "everything"]
found = []
if compared:
    fig, ax = plt.subplots(figsize=(6.6, 0.9 + 0.9 * len(rows) * (0.35 + 0.12 * len(compared))), layout="constrained")
    for i, (name, differences) in enumerate(compared.items()):
        for j, row in enumerate(rows):
            entry, y = differences[row], j + 0.14 * (i - (len(compared) - 1) / 2)
            value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
            clear = low > 0 or high < 0
            if clear:
                found.append(f"{LABELS[name]}: {row} {value:+.1f} points ({low:+.1f} to {high:+.1f})")
            ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=f"C{i}", capsize=2, markersize=5,
                        markerfacecolor=f"C{i}" if clear else "white", label=LABELS[name] if j == 0 else None)  # fmt: skip
    ax.axvline(0, color="0.6", linewidth=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel("difference in right claims (everything: in right images), percentage points")
    count = len(rows) * len(compared)
    worse = sum(run[row]["high"] < 0 for run in compared.values() for row in rows)
    better = sum(run[row]["low"] > 0 for run in compared.values() for row in rows)
    fig.suptitle(f"Of {count} differences from the control, {worse} lie below 0 with their interval, {better} above",
                 fontsize=10)  # fmt: skip
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()
print(*found or ["no interval excludes 0" if compared else "only the control has been trained so far"], sep="\n")

# %% [markdown]
# For a difference that is not in the list, we cannot tell. What is in the list holds for models of four million
# parameters, one training run each of an hour and a half on one core, with fewer steps for FLUX.2, and short captions,
# whose order T5 has already written into its vectors. It does not say that the changes hurt a model of 4 or 32 billion.
#
# ## In five lines
#
# 1. Three shared layers replace the modulation of every block. Blocks lose time courses of their own; in klein, 24 % of
#    the weights become 4 %.
# 2. Without a pooled vector, `vec` depends on time (and, in dev, guidance) alone, and the prompt acts through attention.
# 3. SwiGLU multiplies two products of weights and input; three matrices of a narrower MLP cost 9 D² instead of 8 D².
# 4. No layer has a bias; where its input is modulated, the shift takes over this role.
# 5. Text tokens have positions, so their order reaches the transformer itself.
#
# **Questions people ask**: *Why SwiGLU?* It did better than GELU at equal cost in language models; the paper measures
# that and offers no explanation.
#
# **Read**: `black-forest-labs/flux2`, `src/flux2/model.py` (notebook 16b walks through it) · *GLU Variants Improve
# Transformer*, arXiv 2002.05202 · ours: `fluxedu/models/flux2.py`, whose top lists all differences.

# %%
fe.score()
