# %% [markdown]
# # 10b · The trained velocity field
#
# **How good can a velocity field be, and what would a perfect one generate?** For a small data set you can compute the
# best possible velocity. You will compare a trained network with it, straighten trajectories, measure the miniature's
# own velocity field, and generate with the perfect velocity for six images.
#
# Afterwards you can compute the marginal velocity of a finite data set, explain why trajectories are curved and what
# reflow does, steer a run through its predicted x0, and say why a network with the smallest loss only repeats its data.
#
# 60 minutes · needs notebook 10

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.course.plane import crossings, field, meetings, train
from fluxedu.course.two_shapes import FORTY, number_right, rounded
from fluxedu.nano.scenes import caption, render, sample_scene
from fluxedu.plots import hide_axes
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.widgets.particles import euler_path, particles

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
course.where(pipe, "final", "solver")

# %% [markdown]
# Recall from notebook 10: the state is $x_t = (1 - t)\, x_0 + t\, \varepsilon$ and time 1 is noise. The training loss
# is smallest for the *marginal velocity*, the mean of $\varepsilon - x_0$ over all pairs that could have produced the
# state, and following it turns noise into data. A *trajectory* is the sequence of states of one run.
#
# ## Predict
#
# In the last question the data consist of only six images, and the velocity is the best possible one. We say that the
# image is decided as soon as the *predicted x0*, the image that a velocity implies, is within 5 % of one of the six.

# %%
caption_time = fe.predict("At which time, from 0 to 1, does a caption reduce the miniature's loss most?", 1.0)  # answer
decision_step = fe.predict("At which of 20 steps is it decided which of the six images comes out?", 4)  # answer

# %% [markdown]
# ## Build it
#
# The data are $K$ points $c_k$, all equally likely. Given $x_0 = c_k$, the state is normally distributed around
# $(1 - t)\, c_k$ with standard deviation $t$, and the velocity through $x$ is $(x - c_k) / t$. So Bayes' rule gives
# each point a weight, and the marginal velocity is a sum:
#
# $$p_k(x) = \frac{\exp\bigl( -\| x - (1 - t)\, c_k \|^2 / 2 t^2 \bigr)}
# {\sum_j \exp\bigl( -\| x - (1 - t)\, c_j \|^2 / 2 t^2 \bigr)}, \qquad
# v^*(x, t) = \sum_k p_k(x)\, \frac{x - c_k}{t}$$

# %% exercise="flow.best"

# %% [markdown]
# We train a network on six points of the plane, as in notebook 10, and compare.

# %%
angles = torch.arange(6) * torch.pi / 3
points = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)  # [6, 2]: the data
flow = train(lambda: (points[torch.randint(6, (256,))], torch.randn(256, 2)), steps=900, learning_rate=0.01)
times = torch.linspace(1, 0, 41).tolist()
start = torch.randn(300, 2)
path, _ = euler_path(field(flow), start, times)  # [41, 300, 2]

if fe.passed("flow.best"):
    x0, noise = points[torch.randint(6, (2000,))], torch.randn(2000, 2)
    for t in (0.3, 0.6, 1.0):
        x_t = (1 - t) * x0 + t * noise
        exact = best(x_t, t, points)
        error = 10 * round(10 * float((field(flow)(x_t, t) - exact).norm() / exact.norm()))
        lowest = float((exact - (noise - x0)).square().mean())
        print(f"t = {t}: loss of the best velocity {lowest:.1f}; the network differs from it by about {error} %")

# %% [markdown]
# Even the best velocity has a loss above zero, the variance of the velocities at a point. At t = 1 the state contains
# nothing about its data point. So compare a flow's training loss with that of another run, not with zero.

# %%
if fe.passed("flow.best"):
    g = torch.linspace(-2.6, 2.6, 13)
    grid = torch.cartesian_prod(g, g)  # [169, 2]
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
    for ax, t in zip(axes, (1.0, 0.6, 0.2)):
        ax.quiver(*grid.T, *-best(grid, t, points).T, angles="xy", color="#0072b2", width=0.005)
        ax.plot(*points.T, "o", color="#d55e00")
        ax.set(title=f"t = {t:g}", xlabel="x", aspect="equal")
    fig.suptitle("Direction of sampling, -v: towards the mean of the data at t = 1, to the nearest point near t = 0")
    plt.show()

# %% [markdown]
# In the explorer the right panel shows the predicted x0 of each point, `x - t v`: where it would end if it continued
# straight ahead. At t = 1 the best velocity gives all points the same one, the mean of the data, although no data point
# is there. (Reach the controls with Tab, then use the arrow keys.)

# %%
if fe.passed("flow.best"):
    fields = {"learned": field(flow), "best possible": lambda x, t: best(x, t, points)}
    display(particles(fields, points))

# %% [markdown]
# ## See it
#
# ### Do trajectories cross?
#
# Two trajectories are never at the same point *at the same time*, since there is only one velocity. In a picture of the
# plane they may still cross, at different times. Count both, for 150 training lines and 150 trajectories that start
# from the same noise. Two of them "meet" if they are closer than 0.1 at the same time with velocities that differ by
# more than 1. (We leave out t < 0.2, where all lines to a data point come together.)

# %%
number = 150 * 149 // 2


def count(some: Tensor) -> str:
    crossing, meeting = crossings(some) / number, meetings(some, times) / number
    return f"{crossing:4.0%} cross in the plane, {'less than 1%' if meeting < 0.01 else f'{meeting:.0%}'} meet"


chosen = points[torch.randint(6, (150,))]
lines = torch.stack([(1 - t) * chosen + t * start[:150] for t in times])  # [41, 150, 2]
print(f"training lines: of {number:,} pairs {count(lines)}")
print(f"trajectories:   of {number:,} pairs {count(path[:, :150])}")

# %% [markdown]
# Both cross in the plane, the lines more often. But only the lines meet: there the network predicts the mean, and the
# trajectories bend. How much?

# %% exercise="flow.detour"

# %% [markdown]
# The paper that introduced rectified flow makes trajectories straighter by *reflow*: train again, but instead of random
# pairs use pairs of noise and the point to which the first flow takes it,
#
# $$(x_0, \varepsilon) = \bigl( \varepsilon + \int_1^0 v(x_t, t)\, dt,\; \varepsilon \bigr)$$
#
# The trajectories do not meet, so the lines between their ends should meet less often than random lines.

# %%
noises = torch.randn(2000, 2)
ends = euler_path(field(flow), noises, times)[0][-1]


def reflow_pairs() -> tuple[Tensor, Tensor]:
    i = torch.randint(len(noises), (256,))
    return ends[i], noises[i]


straight = train(reflow_pairs, steps=300, learning_rate=0.005, initial=flow)
straight_path, _ = euler_path(field(straight), start, times)
new_lines = torch.stack([(1 - t) * ends[:150] + t * noises[:150] for t in times])
print(f"lines of reflow: of {number:,} pairs {count(new_lines)}")
if fe.passed("flow.detour"):
    for name, some in (("random pairs", path), ("reflow pairs", straight_path)):
        length = f"{detour(some).median():.1f} times as long as the straight line between its ends"
        print(f"trained on {name}: the median trajectory is {length}")

step_counts, distances = [1, 2, 4, 8, 16], {}
fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
for (name, model), style in zip({"random pairs": flow, "reflow pairs": straight}.items(), ("o-", "s-")):
    runs = [euler_path(field(model), start, torch.linspace(1, 0, n + 1).tolist())[0][-1] for n in step_counts]
    distances[name] = [float(torch.cdist(end, points).amin(dim=1).mean()) for end in runs]
    ax.plot(step_counts, distances[name], style, label=f"trained on {name}")
ax.set_xscale("log", base=2)
ax.set_xticks(step_counts, step_counts)
ax.set(xlabel="steps", ylabel="distance to the nearest point", ylim=0)
ax.set_title("Distance to the data after one step: " + ", with reflow ".join(f"{d[0]:.1f}" for d in distances.values()))
ax.legend()
plt.show()

# %% [markdown]
# With eight steps the advantage is gone: straighter trajectories make fewer steps possible, but not better samples.
# (This is one training run of each; the counts change a little with the seed.)
#
# ### The miniature's own velocity field
#
# The miniature was trained with the same loss (and at first with a second one too, notebook 06b). We measure this loss
# for 24 images like those of its training data, each with its caption and with an empty caption. (This section uses the
# miniature, whatever model you have loaded.)

# %%
rng = np.random.default_rng(3)
scenes = [sample_scene(rng, size=(128, 128)) for _ in range(24)]
captions = [caption(scene, rng)[0] for scene in scenes]
base = fe.load("nano-base", device=device)  # the network before guidance was distilled into it (notebook 12b)
with torch.no_grad():
    pixels = torch.cat([to_tensor(render(scene)) for scene in scenes]).to(device)  # [24, 3, 128, 128]
    data = base.autoencoder.encode(pixels)  # [24, 16, 16, 16]
noise = torch.randn(24, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
loss_times = [0.1, 0.4, 0.7, 0.9, 1.0]


@torch.no_grad()
def losses_with(texts: list[str]) -> Tensor:
    """The miniature's loss for each image, with these captions, at each time: [24, 5]."""
    text, columns = base.prompt_encoder(texts), []
    img_ids, txt_ids = image_ids(16, 16).to(device), text_ids(text.txt.shape[1]).to(device)
    for t in loss_times:
        x, t_batch = pack((1 - t) * data + t * noise), torch.full((24,), t, device=device)
        v = unpack(base.flux(x, img_ids, text.txt, txt_ids, t_batch, text.pooled), 16, 16)
        columns.append((v - (noise - data)).square().flatten(1).mean(dim=1))
    return torch.stack(columns, dim=1).cpu()


curves = {"with caption": losses_with(captions), "empty caption": losses_with([""] * 24)}
reduction = 1 - curves["with caption"] / curves["empty caption"]  # [24, 5]
for t, column in zip(loss_times, reduction.T):
    low, median, high = (float(column.quantile(share)) for share in (0.1, 0.5, 0.9))
    print(f"t = {t:.1f}: the caption reduces the loss by {median:.0%} (median; 8 of 10: {low:.0%} to {high:.0%})")
caption_time.against(loss_times[int(reduction.median(dim=0).values.argmax())])

fig, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
for (name, curve), style in zip(curves.items(), ("o-", "s-")):
    ax.plot(loss_times, curve.mean(0), style, label=name)
ax.set(xlabel="time (1 is noise)", ylabel="mean loss of 24 images", ylim=0)
ax.set_title(f"24 images: the median reduction by the caption is largest at t = 1: {median:.0%}")
ax.legend()
plt.show()

# %% [markdown]
# Up to t = 0.4 the state itself shows the image, and the caption reduces the loss by 6 to 12 % only. Each image has one
# noise, used at all five times, and 24 images do not settle the order of 0.7 and 0.9. Near t = 0 the loss rises again:
# the velocity depends on the noise, of which the state contains almost nothing.
#
# The explorer shows runs of two prompts from the same noise, projected to a plane through their final images:

# %%
widgets.velocity(pipe, [prompt, "a green star above a yellow ring"], seeds=5, steps=8, progress=False)

# %% [markdown]
# ## Put your code into the trained model
#
# The predicted x0 is $\hat{x}_0 = x_t - t\, v$, and conversely an image implies a velocity. So you can steer a run:
# change what the model predicts, and convert it back to a velocity.
#
# $$\hat{x}_0 = x_t - t\, v \qquad \Longleftrightarrow \qquad v = \frac{x_t - \hat{x}_0}{t}$$

# %% exercise="flow.steer"

# %% [markdown]
# `fe.intervene` replaces the value at a *site*, a named point of the model. We let your function replace the velocity
# at every step, such that the left half of the predicted x0 is that of a finished image. What happens to the right
# half?


# %%
state = {}


def store_state(x: Tensor, ctx) -> Tensor:
    state["x"] = x
    return x


def run_with(change: Callable, **settings):
    """Run the pipeline with `change(x, t, v)` in place of the velocity v."""

    def replace(v: Tensor, ctx) -> Tensor:
        x = state["x"]
        return change(x.float(), ctx.time, v.view_as(x).float()).view_as(v).to(v)

    with fe.intervene("sample.x", store_state), fe.intervene("sample.velocity", replace):
        return pipe(**settings, batch=1, progress=False)  # one image at a time, so that the states do not mix


if fe.passed("flow.steer"):
    seeds = list(range(1, 9))
    finished = pipe(prompt, seed=0, steps=8, progress=False)
    known = finished.latents.float().to(device)
    left = torch.arange(known.shape[-1], device=device) < known.shape[-1] // 2  # [w]
    steered = run_with(lambda x, t, v: steer(x, t, v, known, left), prompt=prompt, seed=seeds, steps=8)
    free = pipe(prompt, seed=seeds, steps=8, progress=False)
    for name, out in (("steered", steered), ("not steered", free)):
        change = (out.latents.float().to(device) - known) / known.std()
        halves = [float(change[..., part].square().mean().sqrt()) for part in (left, ~left)]
        print(f"{name:11} distance from the finished image: left half {halves[0]:.1f}, right half {halves[1]:.1f}")
    fig, axes = plt.subplots(2, 5, figsize=(7, 3), layout="constrained")
    for row, out in zip(axes, (steered, free)):
        for ax, image in zip(row, finished.images + out.images):
            hide_axes(ax).imshow(image)
    axes[0, 0].set_title("finished", fontsize=9)
    axes[0, 1].set_title("seeds 1 to 4, steered", fontsize=9, loc="left")
    axes[1, 1].set_title("not steered", fontsize=9, loc="left")
    plt.show()

# %% [markdown]
# (Distances are in standard deviations of the finished image's latent, over eight seeds.)
#
# Now make a mistake, the predicted noise in place of the velocity, as if you had loaded a model that predicts noise,
# and measure how straight the miniature's trajectories are. The *judge*, a program that finds shapes and colours,
# counts for five prompts with eight seeds each how often both objects are there, and nothing else. Counts are given as
# ranges, because rounding on another machine can change one image.

# %%
runs = {
    "the velocity": pipe(**FORTY, steps=8, progress=False),
    "noise as velocity": run_with(lambda x, t, v: x + (1 - t) * v, **FORTY, steps=8),
}
for name, out in runs.items():
    right = rounded(number_right(out.images, FORTY["prompt"]))
    print(f"{name:17} {right} images show both objects and nothing else")
if fe.passed("flow.detour"):
    low, median, high = (float(detour(runs["the velocity"].trajectory.latents).quantile(q)) for q in (0, 0.5, 1))
    print(f"the 40 trajectories are {median:.2f} times as long as the straight line ({low:.2f} to {high:.2f})")

# %% [markdown]
# The miniature's trajectories are much straighter than those in the plane. (A path of eight steps is a little shorter
# than the true curve.)
#
# ## Break it
#
# What is wrong with a perfect network? Your `best` is not limited to the plane: its points can be latents. Give it the
# first six of the images above, 4,096 numbers each, and let the pipeline follow the velocity of `best` instead of the
# transformer's.

# %%
if fe.passed("flow.best"):
    with torch.no_grad():
        known = pipe.autoencoder.encode(pixels[:6].to(pipe.dtype)).float().flatten(1)  # [6, 4096]
    generated = run_with(
        lambda x, t, v: best(x.flatten(1), t, known).view_as(v),
        prompt=prompt, seed=[0, 1, 2, 3, 4, 5], height=128, width=128,
    )  # fmt: skip
    latents = generated.latents.flatten(1).float()  # [6, 4096]
    nearest = torch.cdist(latents, known).argmin(dim=1)  # [6]: the index of the most similar known image
    print("seeds 0 to 5 give the known images", [int(i) + 1 for i in nearest])
    course.compare("the generated latents and these images'", latents, known[nearest], within=0.01)

    predicted_x0 = generated.trajectory.x0.flatten(2).float()  # [20, 6, 4096]
    settled = torch.cdist(predicted_x0, known).amin(-1) < 0.05 * known.norm(dim=1).mean()  # [20, 6]
    decision_step.against(int(settled.float().argmax(dim=0).median()) + 1)

    fig, axes = plt.subplots(2, 6, figsize=(9, 3.3), layout="constrained")
    for k, (above, below) in enumerate(axes.T):
        hide_axes(above).imshow(render(scenes[k]))
        hide_axes(below).imshow(generated.images[k])
    axes[0, 0].set_title("known", loc="left")
    axes[1, 0].set_title("generated", loc="left")
    fig.suptitle("The exact minimiser of the loss on six images generates only these six")
    plt.show()

# %% [markdown]
# Some seeds gave the same image. (The stripes of some shapes are lost in the autoencoder, not in the flow.) The image
# is decided early: at the fourth of twenty steps (t = 0.94), the predicted x0 is within 5 % of one of the six in at
# least half of the runs.
#
# So a network that minimised the loss exactly would have memorised its training set. Everything that we like about a
# flow model, such as a combination that was never in the data, exists because the network does *not* reach that
# minimum.
#
# ## In five lines
#
# 1. For a finite data set the marginal velocity is a sum over the data, weighted by Bayes' rule; its loss is not zero.
# 2. Lines can be at the same point at the same time, trajectories cannot. In the picture, both can cross.
# 3. Training on pairs from the flow itself (reflow) straightens trajectories, and then few steps suffice.
# 4. A velocity implies an image, `x - t v`, and an image implies a velocity, so you can steer a run by its images.
# 5. The exact minimum of the loss on a finite set of images generates only these images.
#
# **Questions people ask**: *My loss does not go below some value; is the training broken?* Not necessarily: you have
# computed the best possible loss, and it is above zero.
#
# **Read**: Flow Straight and Fast, arXiv 2209.03003 (the second training is its *reflow*) · Scaling Rectified Flow
# Transformers, arXiv 2403.03206 · ours: `training/flow.py`, `fluxedu/sampling/velocity_field.py`.

# %%
fe.score()
