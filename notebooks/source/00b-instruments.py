# %% [markdown]
# # 00b · Instruments
#
# **How do you look inside a running model, and how do you change what it computes?** Most later notebooks do this with
# four tools: `fe.record`, `fe.intervene`, `fe.ablate` and `fe.swap`. Here you meet them one at a time.
#
# Afterwards you can name a value inside the model, record a part of it, replace it during a run, and put a module of
# your own into the trained model.
#
# 45 minutes · needs notebook 00

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.instruments import Named

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square on a white background"
reference = pipe(prompt, seed=4, progress=False)

# %% [markdown]
# `reference` is the run that all changes below are compared with. Before you measure something, predict it:
# `fe.predict` stores your answer (replace the three dots by it), `.against` compares it later with the measured value,
# and `fe.score` at the end of a notebook adds up your points.

# %%
blocks = fe.predict(
    "How many double-stream blocks does the miniature have? In these, text and image have separate weights; six more "
    "blocks are of another kind.",
    2,
)  # answer
hold_text = fe.predict(
    "In all steps, the transformer gets the text tokens of the first step. Does the image 'stay' or 'change'?", "stay"
)  # answer
hold_vec = fe.predict(
    "The same with `vec`, which contains the time: does the image 'stay' or 'change'?", "change"
)  # answer

# %% [markdown]
# ## Sites: names for values
#
# A *site* is a named point in the code through which a value passes. `fe.sites` lists the sites of a model, each with
# the shape of its value and what it means. Names are built from the outside to the inside: `double.0.img_attn.q` are
# the queries `q` in the attention of the image stream `img_attn` of the double-stream block number 0. In shapes, B is
# the number of images, L that of text tokens, N of image tokens, and T = L + N. (The *residual stream* and *QKNorm* are
# explained in notebooks 03 and 06.)

# %%
sites = {site.name: site for site in fe.sites(pipe)}
print(len(sites), "sites, for example:")
for name in ("t5.states", "img_in", "double.0.img_attn.q", "single.3.gate", "sample.x"):
    print(f"  {name:20} [{', '.join(map(str, sites[name].shape))}]  {sites[name].meaning}")

# %% [markdown]
# In a *glob*, `*` stands for any characters, `?` for one character and `[qk]` for one of these letters, so one glob can
# name the same site of all blocks. `fe.record`, `fe.intervene` and `fe.ablate` accept several globs.

# %%
from fluxedu.probe import matches

found = [name for name in sites if matches(name, "double.*.img_attn.q")]
print(*found)
blocks.against(len(found))

# %% [markdown]
# ## Record
#
# Inside `with fe.record(...) as rec:`, the values of the named sites are stored while the pipeline runs. Recording does
# not change the run. `rec.keys()` lists what was stored.

# %%
with fe.record("double.1.img_out", "vec") as rec:
    out = pipe(prompt, seed=4, progress=False)
print(rec.keys())
course.compare("the latent of a recorded run and of the reference", out.latents, reference.latents)

# %% [markdown]
# (`course.compare` prints the relative difference of two tensors, and the largest one that rounding explains.)
# `rec[name]` is a `Named`: a tensor whose axes have names. A site that passes one value per step has an axis `step`.
# `.at(step=1)` takes index 1 of this axis, that is, the second *recorded* step.

# %%
print(rec["double.1.img_out"])
print("times of the first three steps:", [round(t, 2) for t in rec["vec"].coords["step"][:3]])

# %% [markdown]
# How to read a `Named`, with a tiny one: two steps, three tokens.

# %%
tiny = Named(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), ("step", "token"))
print("at step 1      :", tiny.at(step=1).tensor.tolist())
print("mean over steps:", tiny.mean("step").tensor.tolist())
print("mean of tokens :", tiny.mean("token").tensor.tolist(), "with the axes", tiny.mean("token").axes)

# %% [markdown]
# ## Select
#
# A selection records less, which saves memory and work afterwards. `steps` are step indices, `times` a range of
# times, `tokens` indices or words of the prompt, `heads` head indices, `streams` is `"txt"` or `"img"`.
# Which axes change below?

# %%
selections = {
    "everything": {},
    "steps 0 and 10": {"steps": [0, 10]},
    "only the image tokens": {"streams": "img"},
    "the token of 'red'": {"tokens": ["red"], "streams": "txt"},
    "late times": {"times": (0.0, 0.5)},
}
for name, selection in selections.items():
    with fe.record("single.2.x", **selection) as rec:
        pipe(prompt, seed=4, progress=False)
    print(f"{name:22}", rec["single.2.x"])

# %% [markdown]
# ## Reduce
#
# `reduce=` takes a function that turns every recorded value into a smaller one before it is stored. Write one.
# `fe.check`, below each exercise, tests your answer and explains common mistakes, and `fe.passed` lets the cells that
# use your code wait until it is right: then run them and all cells below.

# %% exercise="instruments.lengths"

# %%
if fe.passed("instruments.lengths"):
    chosen = ["double.*.out", "single.*.out"]
    with fe.record(*chosen, steps=[10]) as whole:
        pipe(prompt, seed=4, progress=False)
    with fe.record(*chosen, steps=[10], reduce=lengths) as rec:
        pipe(prompt, seed=4, progress=False)
    print(f"whole values: {whole.nbytes:,} bytes · lengths: {rec.nbytes:,} bytes")
    print(rec[rec.keys()[-1]])

    names, txt_len = rec.keys(), rec.txt_len  # text tokens come first
    table = torch.stack([rec[name].at(step=0).tensor.float() for name in names])  # [blocks, tokens]; index 0 is step 10
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for label, part in {"text tokens": table[:, :txt_len], "image tokens": table[:, txt_len:]}.items():
        ax.plot(part.median(1).values, "o-", label=label)
    ax.set_xticks(range(len(names)), [name.removesuffix(".out") for name in names], rotation=45)
    ax.set_ylabel("median length of a token")
    ax.set_ylim(bottom=0)
    first, last = table[0, :txt_len].median(), table[-1, :txt_len].median()
    ax.set_title(f"Step 10 of this run: the text tokens' lengths grow from {first:.0f} to {last:.0f}", fontsize=10)
    ax.legend()
    plt.show()

# %% [markdown]
# ## Intervene
#
# `fe.intervene(site, change)` replaces the value at a site by `change(value, ctx)`, and the run continues with the
# result. `value` is a copy of the tensor, and the context `ctx` says where it comes from: `ctx.site`, `ctx.axes`,
# `ctx.step` and `ctx.time`. (`ctx.tokens(["red"])` gives the indices of a word's tokens, and `ctx.generator` random
# numbers that are the same in every run with the same seed.) This function only looks, and returns the value as it is:


# %%
def look(value: Tensor, ctx) -> Tensor:
    if ctx.step in (0, 10):
        print(f"{ctx.site} · axes {ctx.axes} · shape {list(value.shape)} · step {ctx.step} · time {ctx.time:.2f}")
    return value


with fe.intervene("txt_in", look):
    out = pipe(prompt, seed=4, progress=False)
course.compare("the latent with this function and without", out.latents, reference.latents)

# %% [markdown]
# Now a function that changes something. It gets two settings, so you write a function that returns a function.

# %% exercise="instruments.scale_tokens"

# %%
tokens = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
red = tokens.index("▁red")
print("token", red, "is", tokens[red])


def difference(out) -> float:
    """How much the run's latent differs from the reference, relative to its length."""
    return float((out.latents - reference.latents).norm() / reference.latents.norm())


if fe.passed("instruments.scale_tokens"):
    for factor in (1.0, 0.5, 0.0):
        with fe.intervene("txt_in", scale_tokens([red], factor)):
            changed = pipe(prompt, seed=4, progress=False)
        print(f"'red' times {factor}: the latent changes by {difference(changed):.0%}")

# %% [markdown]
# A function can store a value for later steps. The next one shows which values are the same in every step.

# %% exercise="instruments.hold"

# %%
if fe.passed("instruments.hold"):
    for name, guess in {"txt_in": hold_text, "vec": hold_vec}.items():
        with fe.intervene(name, hold()):
            held = pipe(prompt, seed=4, progress=False)
        print(f"{name} of the first step in all steps: the latent changes by {difference(held):.0%}")
        guess.against("stay" if difference(held) < 1e-5 else "change")

# %% [markdown]
# T5's vectors do not depend on the time, so nothing changes when the first ones are held. `vec` contains the time: with
# the first `vec`, the network treats every state as pure noise.
#
# ## Ablate
#
# *Ablation* sets values to zero, or to their mean (`to="mean"`). `fe.ablate` is a short form of `fe.intervene` with the
# same selections. So your function with the factor 0 and an ablation of the same token do the same:

# %%
with fe.ablate("txt_in", tokens=["red"]):
    ablated = pipe(prompt, seed=4, progress=False)
if fe.passed("instruments.scale_tokens"):
    with fe.intervene("txt_in", scale_tokens([red], 0.0)):
        scaled = pipe(prompt, seed=4, progress=False)
    course.compare("the latents of your intervention and of the ablation", scaled.latents, ablated.latents)

# %% [markdown]
# ## Swap
#
# An intervention changes a value. `fe.swap(glob, new, pipe)` changes the code: it puts a module of yours into the place
# of each module whose name fits, and copies the trained weights into it. Your parameters must therefore have the same
# names and shapes. `new` is a function that gets the old module and builds the new one. It may also be a class, which
# is built with the arguments of the module that it replaces, or a finished module; later notebooks use all three.

# %% exercise="instruments.Linear"

# %%
if fe.passed("instruments.Linear"):
    for glob in ("img_in", "txt_in", "double.*.img_attn.proj"):
        with fe.swap(glob, lambda old: Linear(old.in_features, old.out_features), pipe):
            out = pipe(prompt, seed=4, progress=False)
        course.compare(f"the latent with your layer at {glob}", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# After the `with` block, the model is what it was before, whatever the tool.
#
# ## Break it
#
# What happens if a name is wrong, if a token does not exist, or if a function returns the wrong shape? Guess, then run.


# %%
def attempt(instrument) -> None:
    """Run the pipeline with an instrument and print the error."""
    try:
        with instrument:
            pipe(prompt, seed=4, steps=2, progress=False)
    except fe.FluxeduError as error:
        print(f"{type(error).__name__}: {error}")


attempt(fe.record("double.0.img_atn.q"))
attempt(fe.record("single.2.x", tokens=["green"]))
attempt(fe.intervene("txt_in", lambda value, ctx: value[:, :5]))
attempt(fe.ablate("single.2.gate", heads=[0]))

# %% [markdown]
# ## In five lines
#
# 1. A site is a named point that a value passes through; a glob such as `double.*.out` names several.
# 2. `fe.record` stores values as `Named` tensors; steps, times, tokens, heads and streams select a part, and `reduce=`
#    stores something smaller.
# 3. `fe.intervene` replaces a value by `change(value, ctx)`; `fe.ablate` sets a part of it to zero or to the mean.
# 4. `fe.swap` replaces modules by yours and copies the trained weights.
# 5. All of them act inside a `with` block and leave nothing behind.
#
# **Questions people ask**: *How do I find the name of a value?* `fluxedu sites attn` on the command line lists the
# sites whose names contain a word; the explorer `widgets.architecture(pipe, prompt)` shows them in the diagram. *Why
# not PyTorch's hooks?* Hooks see only the inputs and outputs of modules; sites also name values in between, such as
# queries after the rotation. *What does it cost?* An unwatched site costs one `is None` check.
#
# **Read**: `fluxedu/probe.py`, then `fluxedu/instruments/recorder.py` and `interventions.py`.

# %%
fe.score()
