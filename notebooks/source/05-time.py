# %% [markdown]
# # 05 · Time
#
# **How does the network know how noisy its input is?** It gets the time as a number. The embeddings of this number, of
# the guidance scale (how strongly the image should follow the prompt) and of one vector of the text are added up to a
# single vector, `vec`. You will build all of it, put it into the trained model, and give the model a wrong time.
#
# Afterwards you can say how a number is encoded for a network, what `vec` contains and what it does not contain, and
# how exact the time has to be.
#
# 60 minutes · needs notebook 00b

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models.modulation import timestep_embedding

device = course.begin()
pipe = fe.load(device=device)
flux = pipe.flux
prompt = "a red circle on a white background"
reference = pipe(prompt, seed=4, progress=False)
times = reference.trajectory.times[:-1].to(device)  # [20], from 1 (noise) down
course.where(pipe, "vec")

# %% [markdown]
# `vec` is one vector per image. It is not a token and takes no part in attention. From `vec`, every block computes how
# it changes its tokens (*modulation*, notebook 05b); this is the only way in which the network learns the time.
#
# ## Predict
#
# The time will be encoded by waves, the fastest of which is $\cos(1000\,t)$. For the third question, we compare how far
# `vec` moves if one of its three parts changes: the time from the first step to the last, the guidance scale from 6 to
# 1, or the prompt to another one. For the last question, 40 images are drawn with the constant time 0.5 instead of the
# right one; 'most' means more than 75 %, 'few' less than 25 %.

# %%
fastest_wave = fe.predict("How many full turns does the fastest wave make while t goes from 1 to 0?", 159)  # answer
without_guidance = fe.predict("Which of 'dev' and 'schnell' has no guidance input?", "schnell")  # answer
largest_part = fe.predict(
    "Which part moves vec furthest when it changes: 'time', 'guidance' or 'prompt'?", "time"
)  # answer
constant_time = fe.predict(
    "With the time always 0.5, how many images show what the prompt says: 'most', 'some' or 'few'?", "few"
)  # answer

# %% [markdown]
# ## Build it
#
# A single number is a poor input for a linear layer, which can only scale it. So the time is encoded by many waves of
# different frequencies, as the time of day is encoded by the hands of a clock. FLUX uses 128 waves, with the
# frequencies
#
# $$\omega_i = 1000 \cdot 10\,000^{-i/128}, \qquad i = 0, \dots, 127$$
#
# One wave gives two numbers, and they have a useful property: for a time that is larger by $\delta$, they are rotated
# by the angle $\omega\delta$, for every $t$.
#
# $$\begin{pmatrix} \cos\omega(t+\delta) \\ \sin\omega(t+\delta) \end{pmatrix} = \begin{pmatrix} \cos\omega\delta &
# -\sin\omega\delta \\ \sin\omega\delta & \cos\omega\delta \end{pmatrix} \begin{pmatrix} \cos\omega t \\ \sin\omega t
# \end{pmatrix}$$
#
# So a linear layer can compute the waves of a later time from those of an earlier one.

# %% exercise="modulation.waves"
# The guidance scale is encoded in the same way, also multiplied by 1000.

# %%
if fe.passed("modulation.waves"):
    course.compare("your waves and the library's", waves(times.cpu(), 256), timestep_embedding(times.cpu()), 1e-3)
fastest_wave.against(round(1000 / (2 * torch.pi)))

cosines = timestep_embedding(torch.linspace(1, 0, 701))[:, 20:128].T  # without the 20 fastest
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
heatmap = ax.imshow(cosines, aspect="auto", cmap="cividis", extent=(1, 0, 128, 20), interpolation="nearest")
ax.set(xlabel="time t (1 is noise)", ylabel="index of the wave")
fig.suptitle("Fast waves distinguish neighbouring times, slow waves distinguish early from late times")
fig.colorbar(heatmap, label="cosine")
plt.show()

# %% [markdown]
# How similar are the embeddings $e(t)$ of two times? Their dot product depends only on the difference of the times,
# because $\cos a \cos b + \sin a \sin b = \cos(a - b)$ for each wave:
#
# $$e(t) \cdot e(t') = \sum_{i=0}^{127} \cos\big(\omega_i (t - t')\big)$$

# %%
print("difference   dot product / 128, at t = 0.9   at t = 0.6")
for difference in (0, 0.001, 0.01, 0.1, 0.5):
    pairs = (timestep_embedding(torch.tensor([t, t - difference])) for t in (0.9, 0.6))
    similar = [float(earlier @ later) / 128 for earlier, later in pairs]
    print(f"{difference:10}   {similar[0]:30.2f} {similar[1]:12.2f}")

# %% [markdown]
# `1000 t` is a real number, not the index of a step. In bfloat16 it is off by whole units, so fluxedu computes the time
# embedding from a float32 time. The official code passes the time in bfloat16 (notebook 11):

# %%
t = torch.tensor(0.90453)
print("exact:", round(1000 * float(t), 2), "· computed in bfloat16:", int(t.bfloat16() * 1000))

# %% [markdown]
# A small module brings the encoded time to the network's width. A second module of the same kind does this for the
# encoded guidance scale, and a third for CLIP's pooled vector.

# %% exercise="modulation.embedder"

# %% [markdown]
# ## What `vec` contains
#
# With $e$ for the waves, $g$ for the guidance scale and $p$ for the pooled vector,
#
# $$\mathrm{vec} = \mathrm{MLP}_{\text{time}}(e(t)) + \mathrm{MLP}_{\text{guidance}}(e(g)) + \mathrm{MLP}_{\text{text}}(p)$$

# %% exercise="modulation.vec"

# %%
guidance = torch.tensor([pipe.defaults.guidance], device=device)  # [1]
pooled = pipe.prompt_encoder([prompt]).pooled  # [1, 96]
with torch.no_grad():
    plan = flux.plan(times[:, None], guidance, pooled)  # `vec` and the modulation of all 20 steps at once
if fe.passed("modulation.vec"):
    with torch.no_grad():
        mine = build_vec(flux, times, guidance.expand(20), pooled.expand(20, -1).to(pipe.dtype))
    course.compare("your vec of all 20 steps and the library's", mine, plan.vec[:, 0])

has_input = {name: fe.models.FluxConfig.variant(name).guidance_embed for name in ("dev", "schnell")}
print("guidance input:", {name: "yes" if value else "no" for name, value in has_input.items()})
without_guidance.against(next(name for name, value in has_input.items() if not value))

# %% [markdown]
# FLUX.1-schnell has no guidance input: its `vec` is time plus text. Note what is *not* part of `vec`: the image tokens
# and T5's token vectors. CLIP's pooled vector does contain much of the prompt (notebook 02b reads colours from it
# nearly always, the first shape half of the time). But how much of `vec` is that? We compare the three parts over 40
# prompts.

# %%
colours, shapes = ("red", "green", "blue", "yellow", "orange"), ("circle", "square", "triangle", "star")
forty = [
    f"a {colour} {shape} on a {back} background"
    for colour in colours
    for shape in shapes
    for back in ("white", "black")
]
with torch.no_grad():
    time_terms = flux.time_in(timestep_embedding(times).to(pipe.dtype)).float()  # [20, D]
    scales = torch.tensor([1.0, pipe.defaults.guidance], device=device)
    guidance_terms = flux.guidance_in(timestep_embedding(scales).to(pipe.dtype)).float()  # [2, D]
    text_terms = flux.vector_in(pipe.prompt_encoder(forty).pooled.to(pipe.dtype)).float()  # [40, D]
distances = {
    "time": float((time_terms[0] - time_terms[-1]).norm()),
    "guidance": float((guidance_terms[0] - guidance_terms[1]).norm()),
    "prompt": float(torch.pdist(text_terms).median()),
}
for name, how in (("time", "first step to last"), ("guidance", "scale 1 to 6"), ("prompt", "median of all pairs")):
    print(f"{name:9} moves vec by {distances[name]:4.1f}   ({how})")
largest_part.against(max(distances, key=distances.get))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(times.cpu(), time_terms.norm(dim=-1).cpu(), color="#0072B2", label="time")
ax.axhline(guidance_terms[1].norm().cpu(), color="#D55E00", linestyle="--", label="guidance scale 6")
lengths = text_terms.norm(dim=-1).cpu()
ax.axhspan(lengths.min(), lengths.max(), color="#009E73", alpha=0.4, label="pooled text, 40 prompts")
ax.set(xlabel="time t (1 is noise)", ylabel="length of the vector", xlim=(1, 0), ylim=(0, None))
fig.suptitle("Of the three terms of vec, only that of the time changes during a run")
ax.legend()
plt.show()

# %% [markdown]
# The text's term is long, but two prompts of this kind differ by only 3.5 in the median (12.4 at most; measured, not
# shown here), little next to the time's 55. How far the image follows CLIP's vector is measured in notebook 05b.
#
# ## Put your code into the trained model
#
# `fe.swap` replaces modules by yours and copies the trained weights into them. Here these are the three embedders. Then
# your `build_vec` supplies `vec` in every step: `fe.intervene` sets the model's own three terms to zero and replaces
# the value at the site `vec` by yours (a *site* is a named point inside the model). The control is the same run
# without your `vec`: there `vec` is 0.


# %%
def zero(value, ctx):
    return 0 * value


def my_vec(vec, ctx):
    return build_vec(flux, torch.tensor([ctx.time], device=device), guidance, pooled.to(pipe.dtype))


if fe.passed("modulation.embedder", "modulation.vec"):
    with (
        fe.swap("time_in", MLPEmbedder, flux),
        fe.swap("guidance_in", MLPEmbedder, flux),
        fe.swap("vector_in", MLPEmbedder, flux),
        fe.intervene("vec.*", zero),
    ):
        without_vec = pipe(prompt, seed=4, progress=False)
        with fe.intervene("vec", my_vec):
            out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your vec and with the library's", out.latents, reference.latents, within=1e-3)
    change = float((without_vec.latents - reference.latents).norm() / reference.latents.norm())
    print(f"with vec = 0 the latent changes by {change:.0%}")
    fig, axes = plt.subplots(1, 3, figsize=(6, 2.3), layout="constrained")
    for ax, run, name in zip(axes, (reference, out, without_vec), ("the library's vec", "your vec", "vec = 0")):
        ax.imshow(run.images[0])
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    plt.show()

# %% [markdown]
# ## Break it: a wrong time
#
# We change only the time that the network *receives*; the noise in its input stays as it is. Can the network tell by
# itself how noisy its input is? If it did not need the time, the six images would be alike.


# %%
def replace_time(function):
    """An intervention on `vec.time`: the embedding of `function(t)` instead of the time t."""

    def change(embedding, ctx):
        wrong_time = torch.tensor([function(ctx.time)], device=device)
        return flux.time_in(timestep_embedding(wrong_time).to(embedding))

    return change


interventions = {
    "right time": lambda t: t,
    "0.1 too high": lambda t: min(1.0, t + 0.1),
    "0.1 too low": lambda t: max(0.0, t - 0.1),
    "always 1": lambda t: 1.0,
    "always 0.5": lambda t: 0.5,
    "always 0": lambda t: 0.0,
}
fig, axes = plt.subplots(1, len(interventions), figsize=(10, 2.3), layout="constrained")
for ax, (name, function) in zip(axes, interventions.items()):
    with fe.intervene("vec.time", replace_time(function)):
        ax.imshow(pipe(prompt, seed=4, progress=False).images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("The time that the network receives (one image, seed 4)")
plt.show()

# %% [markdown]
# One image shows what a failure looks like, not how often it happens. So here are 40 scenes of two shapes, each with
# its own seed. The *judge*, a program of this course that recognises shapes and colours, says whether the image shows
# everything that the prompt says (with a 95 % interval). Two controls are on the left: the right time, and the right
# time with another seed.

# %%
stored = evidence.load("wrong_time")
fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
evidence.plot(ax, {name: row["everything right"] for name, row in stored.items()}, color="#0072B2")
ax.set(
    ylabel="share of 40 images with everything right",
    ylim=(-0.03, 1.03),
    title="With errors of 0.1 most images are right, with a constant time almost none",
)
ax.tick_params(axis="x", labelrotation=90)
plt.show()
for name, row in stored.items():
    right, change = evidence.percent(row["everything right"]), evidence.number(row["change of the latent"])
    print(f"{name:24} right {right} · the latent changes by {change}")
share = stored["always 0.5"]["everything right"]["value"]
constant_time.against("most" if share > 0.75 else "few" if share < 0.25 else "some")

# %% [markdown]
# With an error up to 0.1, about as many images are right. But they are different images: with a time that is 0.05 too
# low, the latent changes almost as much as with another seed; with a time that is too high, it changes much less. With
# an error of 0.3 far fewer images are right (20 % and 40 %, against 92 %); with a constant time, at most 10 %. So the
# network does not find out by itself how noisy its input is; it relies on the time that it receives.
#
# ## In five lines
#
# 1. The time is encoded by 128 waves, cosines first, from `1000 t`; the guidance scale likewise.
# 2. The dot product of two embeddings depends only on the difference of their times.
# 3. `vec` = time + guidance + pooled text, each through an MLP of its own; schnell has no guidance.
# 4. `vec` knows neither the image tokens nor T5's vectors; of the prompt it contains CLIP's pooled vector.
# 5. The network relies on the time that it receives: with an error of 0.1 about as many images are right, with a
#    constant time almost none.
#
# **Questions people ask**: *Is the guidance input the same as classifier-free guidance?* (flux issues 63, 159) No: it
# is a term of `vec`, learned by distillation, and needs one evaluation of the network per step. Notebooks 12 and 12b
# compare the two. *Is CLIP's vector pooled?* (flux issue 64) Yes, one vector per prompt, and it enters the network only
# here.
#
# **Read**: the waves, arXiv 1706.03762, section 3.5 · `black-forest-labs/flux`, `modules/layers.py`
# (`timestep_embedding`, `MLPEmbedder`) · ours: `fluxedu/models/modulation.py`.

# %%
fe.score()
