# %% [markdown]
# # 10 · Rectified flow
#
# **What does the network learn?** A velocity for every mixture of image and noise: in which direction, and how fast,
# the mixture changes as it gets noisier. The training loss fits on three lines. You will write it, train a flow of your
# own in the plane, and then look at the same quantities in the miniature.
#
# Afterwards you can say which sign the velocity has and why, what a network that minimises this loss exactly would
# generate, derive why following its velocity turns noise into data, and explain why trajectories are curved although
# every line in the training data is straight.
#
# 90 minutes, in two sittings: stop before “The miniature's own velocity field” · needs notebook 00

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.nano.scenes import caption, render, sample_scene
from fluxedu.plots import hide_axes
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.widgets.particles import euler_path, particles

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
library = {name: task.solution for name, task in course.all_exercises().items()}  # used until yours are written
course.where(pipe, "final", "solver")

# %% [markdown]
# The transformer's last layer computes a velocity, and the solver follows it step by step. Time runs from t = 1 (noise)
# to t = 0 (the image). Other texts use the opposite convention, with the image at 1, so check this first in every text.
#
# A *trajectory* is the sequence of states of one run. The *predicted x0* is the image that a velocity implies if it
# stayed constant: $\hat{x}_0 = x_t - t\, v$.
#
# ## Predict
#
# In the last question the data consist of only six images, and the velocity is the best possible one, which can be
# computed exactly. We say that the image is decided as soon as the predicted x0 is within 5 % of one of the six.

# %%
direction = fe.predict(
    "Halfway through a run, does the velocity point towards the noise or the image? the noise / the image", "the noise"
)  # answer
lowest_loss = fe.predict(
    "How small can the training loss become, with a perfect network? zero / above zero", "above zero"
)  # answer
straight_paths = fe.predict(
    "The training data are points on straight lines. Are the trajectories straight, too? yes / no", "no"
)  # answer
decision_step = fe.predict("At which of 20 steps is it decided which of the six images comes out?", 4)  # answer

# %% [markdown]
# ## Build it
#
# Take an image $x_0$ and noise $\varepsilon$, and draw the straight line between them. The point on this line that
# belongs to the time $t$ is the state $x_t$, and its derivative with respect to time is the velocity to be learned:
#
# $$x_t = (1 - t)\, x_0 + t\, \varepsilon, \qquad v = \frac{d x_t}{d t} = \varepsilon - x_0$$

# %% exercise="flow.between"

# %%
used_between = between if passed else library["flow.between"]

# %% [markdown]
# The sign is the most common mistake here. As t grows the state gets noisier, so `noise - x0` points **towards the
# noise**. A sampler, whose time falls, moves against it: `x + (t_next - t) * v` with a negative step.

# %%
half = int((original.trajectory.times - 0.5).abs().argmin())
v, latents = original.trajectory.velocities[half, 0], original.trajectory.latents[:, 0]
similarity = torch.cosine_similarity(v.flatten(), (latents[0] - latents[-1]).flatten(), dim=0)
direction.against("the noise" if similarity > 0 else "the image")

# %% [markdown]
# The loss is the mean squared error of the predicted velocity, over random images, noise and times:
#
# $$L = \mathbb{E}_{x_0,\, \varepsilon,\, t}\; \| v_\theta(x_t, t) - (\varepsilon - x_0) \|^2$$

# %% exercise="flow.loss"

# %%
used_loss = loss if passed else library["flow.loss"]

# %% [markdown]
# This is the whole training: draw images, noise and times at random, and minimise the loss. To begin with, our “images”
# are six points of a plane, and our network has three layers. Training takes a few seconds.


# %%
class Velocity(nn.Module):
    """From a point and a time to a velocity."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # [B, 2], [B] -> [B, 2]
        angles = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])  # [B, 4]
        return self.layers(torch.cat([x, t[:, None], angles.cos(), angles.sin()], dim=-1))


def train(pairs: Callable, steps: int, learning_rate: float, initial: Velocity | None = None) -> Velocity:
    """Train a network on batches `x0, noise = pairs(256)`, starting from the weights of `initial` if given."""
    torch.manual_seed(1)
    model = Velocity()
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    for _ in range(steps):
        x0, noise = pairs(256)
        optimiser.zero_grad()
        used_loss(model, x0, noise, torch.rand(256)).backward()
        optimiser.step()
        scheduler.step()
    return model.requires_grad_(False)


def velocity_of(model: Velocity) -> Callable:
    """The model as `velocity(x, t)` with one time for the whole batch, as a solver calls it."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return model(x, torch.full((len(x),), t))

    return velocity


angles = torch.arange(6) * torch.pi / 3
points = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)  # [6, 2]: the data
flow = train(lambda count: (points[torch.randint(6, (count,))], torch.randn(count, 2)), steps=900, learning_rate=0.01)

times = torch.linspace(1, 0, 41).tolist()
start = torch.randn(300, 2)
path, _ = euler_path(velocity_of(flow), start, times)  # [41, 300, 2]
near = torch.cdist(path[-1], points).amin(dim=1) < 0.3
print(f"about {10 * round(10 * float(near.float().mean()))} % of 300 samples end within 0.3 of one of the six points")

# %% [markdown]
# ## See it

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.1), layout="constrained", sharex=True, sharey=True)
for noise, point in zip(start[:70], points[torch.randint(6, (70,))]):
    left.plot(*zip(noise, point), color="#56b4e9", linewidth=0.8)
right.plot(*path[:, :70].permute(2, 0, 1).numpy(), color="#56b4e9", linewidth=0.8)
titles = "Training data: straight lines", "Learned flow: curved trajectories"
for ax, title in zip((left, right), titles):
    ax.plot(*start[:70].T, ".", color="0.5", markersize=4, label="noise, t = 1")
    ax.plot(*points.T, "o", color="#d55e00", label="data, t = 0")
    ax.set(title=title, xlabel="x", aspect="equal")
left.set_ylabel("y")
left.legend(loc="lower left", fontsize=8)
plt.show()

# %% [markdown]
# Two training lines can pass through the same point *at the same time* with different velocities: for every point,
# time and image $x_0$ there is a noise $\varepsilon$ that fits. The network has one output for that point and time.
# Which one is best? Write $u = \varepsilon - x_0$. For any prediction $v$, the expected squared error over all lines
# through $x$ at time $t$ consists of two parts:
#
# $$\mathbb{E}\,\bigl[\| v - u \|^2 \bigm| x_t = x \bigr] = \bigl\| v - \mathbb{E}[u \mid x_t = x] \bigr\|^2
# + \mathbb{E}\,\bigl[\| u - \mathbb{E}[u \mid x_t = x] \|^2 \bigm| x_t = x \bigr]$$
#
# (The mixed term vanishes, since $u$ minus its mean has the mean zero.) The second part does not depend on $v$. The
# first is smallest, zero, if the network predicts the **mean** of the velocities, called the *marginal velocity*:
#
# $$v^*(x, t) = \mathbb{E}\,[\,\varepsilon - x_0 \mid x_t = x\,]$$
#
# ### Why following the mean works
#
# No single line follows $v^*$. Why do samples that follow it become data, all the same? A density $p_t$ that is moved
# by a velocity $v$ obeys the *continuity equation*: what flows out of a region is missing in it afterwards,
#
# $$\partial_t\, p_t(x) = -\nabla \cdot \bigl( p_t(x)\, v(x, t) \bigr)$$
#
# and if the density at one time and the velocities are known, the equation determines the density at all times. Take
# all lines of one image $x_0$. Their states are normally distributed around $(1 - t)\, x_0$ with standard deviation
# $t$, which is the *conditional* density $p_t(x \mid x_0)$. The noise of the line through $x$ is
# $\varepsilon = (x - (1 - t)\, x_0) / t$, so there is one velocity for each point and time,
# $u(x, t \mid x_0) = \varepsilon - x_0 = (x - x_0) / t$, and the conditional density obeys the continuity equation with
# this velocity. Now average over the images. All states together have the *marginal* density
# $p_t(x) = \int p_t(x \mid x_0)\, p(x_0)\, dx_0$, and derivative and integral can be exchanged:
#
# $$\partial_t\, p_t(x) = -\nabla \cdot \int p_t(x \mid x_0)\, p(x_0)\, u(x, t \mid x_0)\, dx_0
# = -\nabla \cdot \bigl( p_t(x)\, v^*(x, t) \bigr)$$
#
# The last step is Bayes' rule: $p(x_0 \mid x_t = x) = p_t(x \mid x_0)\, p(x_0) / p_t(x)$ is how probable each image is
# given the state, so
#
# $$v^*(x, t) = \int u(x, t \mid x_0)\; \frac{p_t(x \mid x_0)\, p(x_0)}{p_t(x)}\; dx_0$$
#
# Thus $v^*$ moves the marginal density exactly as the lines do: from pure noise at $t = 1$ to the data at $t = 0$. The
# single points take other paths than the lines, but at each time all of them together have the same density.
#
# If the data are a few known points, the integral is a sum, and you can compute it.

# %% exercise="flow.best"

# %%
used_best = best if passed else library["flow.best"]
x0, noise = points[torch.randint(6, (2000,))], torch.randn(2000, 2)
losses = []
for t in (0.3, 0.6, 1.0):
    state = (1 - t) * x0 + t * noise
    exact = used_best(state, t, points)
    error = (velocity_of(flow)(state, t) - exact).norm() / exact.norm()
    losses.append(float((exact - (noise - x0)).square().mean()))
    percent = 10 * round(10 * float(error))
    print(
        f"t = {t}: relative error of the trained network about {percent} %; loss of the best velocity {losses[-1]:.1f}"
    )
lowest_loss.against("above zero" if losses[-1] > 0.01 else "zero")

# %% [markdown]
# Even the best possible velocity has a loss above zero: the second part of the sum above, the variance of the
# velocities at a point. At t = 1 the state does not contain any information about the data point it belongs to. So the
# value of a flow's training loss means little by itself. Compare it with the loss of another run, not with zero.

# %%
g = torch.linspace(-2.6, 2.6, 13)
grid_points = torch.cartesian_prod(g, g)  # [169, 2]
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
for ax, t in zip(axes, (1.0, 0.6, 0.2)):
    arrows = -used_best(grid_points, t, points)
    ax.quiver(*grid_points.T, *arrows.T, angles="xy", color="#0072b2", width=0.005)
    ax.plot(*points.T, "o", color="#d55e00")
    ax.set(title=f"t = {t:g}", xlabel="x", aspect="equal")
axes[0].set_ylabel("y")
fig.suptitle("Direction of sampling, -v: towards the mean of the data at t = 1, to the nearest point near t = 0")
plt.show()

# %% [markdown]
# Now follow single points through the learned velocity field and through the best possible one. The right panel shows
# the predicted x0 of each point, `x - t v`: where it would end if it continued straight ahead. (Reach the controls with
# Tab, then use the arrow keys.)

# %%
particles({"learned": velocity_of(flow), "best possible": lambda x, t: used_best(x, t, points)}, points)

# %% [markdown]
# At t = 1 the best possible velocity gives all points the same predicted x0, the mean of the data, although no data
# point is there.
#
# ### Do they cross?
#
# Since there is only one velocity for each point and time, two trajectories are never at the same point *at the same
# time*. In a picture of the plane they may still cross, when they pass through the same point at different times. Count
# both, for 150 training lines and for 150 trajectories of the learned flow that start from the same noise. Two of them
# "meet" if they are closer than 0.1 at the same time with velocities that differ by more than 1. (We leave out t < 0.2,
# where all lines to the same data point come together.)


# %%
def count_crossings(path: Tensor) -> int:
    """How many pairs of trajectories cross in the plane, at any two times: `path [N + 1, B, 2]`."""

    def side(a, b, c):  # above zero if c is to the left of the line from a to b
        return (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]

    path, crossings = path[::2], 0
    for i in range(path.shape[1] - 1):
        a, b = path[:-1, i, None, None], path[1:, i, None, None]  # [N, 1, 1, 2]: the segments of trajectory i
        c, d = path[None, :-1, i + 1 :], path[None, 1:, i + 1 :]  # [1, N, B - i - 1, 2]: those of the later ones
        crosses = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
        crossings += int(crosses.any(0).any(0).sum())
    return crossings


def count_meetings(path: Tensor) -> int:
    """How many pairs are at nearly the same point at the same time with different velocities."""
    meet = torch.zeros(path.shape[1], path.shape[1], dtype=torch.bool)
    for k in range(32):  # from t = 1 to t = 0.2
        v = (path[k + 1] - path[k]) / (times[k + 1] - times[k])
        meet |= (torch.cdist(path[k], path[k]) < 0.1) & (torch.cdist(v, v) > 1)
    return int(meet.triu(1).sum())


def in_percent(count: int, total: int) -> str:
    return f"{count / total:.0%}" if count >= 0.01 * total else "less than 1%"


chosen = points[torch.randint(6, (150,))]
lines = torch.stack([(1 - t) * chosen + t * start[:150] for t in times])  # [41, 150, 2]
pairs = 150 * 149 // 2
for name, some in {"training lines": lines, "trajectories": path[:, :150]}.items():
    crossings = in_percent(count_crossings(some), pairs)
    print(f"{name:15} {crossings} of {pairs:,} pairs cross in the plane, {count_meetings(some)} pairs meet")

# %% [markdown]
# Both cross in the plane, the lines more often. But only the lines meet: there the network has to predict the mean, and
# the trajectories bend. How much?

# %% exercise="flow.detour"

# %%
used_detour = detour if passed else library["flow.detour"]
median_detour = float(used_detour(path).median())
print(f"the median trajectory is {median_detour:.1f} times as long as the straight distance")
straight_paths.against("yes" if median_detour < 1.02 else "no")

# %% [markdown]
# The paper that introduced rectified flow makes trajectories straighter by *reflow*: train again, but instead of random
# pairs use pairs of noise and the point to which the first flow takes it. The trajectories do not meet, so the lines
# between their ends should meet less often than random lines.

# %%
noises = torch.randn(2000, 2)
ends = euler_path(velocity_of(flow), noises, times)[0][-1]


def reflow_pairs(count: int) -> tuple[Tensor, Tensor]:
    i = torch.randint(len(noises), (count,))
    return ends[i], noises[i]


straight = train(reflow_pairs, steps=300, learning_rate=0.005, initial=flow)
straight_path, _ = euler_path(velocity_of(straight), start, times)
reflow_lines = torch.stack([(1 - t) * ends[:150] + t * noises[:150] for t in times])
print(f"lines between the new pairs that meet: {in_percent(count_meetings(reflow_lines), pairs)} of {pairs:,}")
print(f"after reflow the median trajectory is {used_detour(straight_path).median():.1f} times as long as straight")
crossings = in_percent(count_crossings(straight_path[:, :150]), pairs)
print(f"trajectories after reflow: {crossings} cross in the plane, {count_meetings(straight_path[:, :150])} pairs meet")

step_counts = [1, 2, 4, 8, 16]
fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
end_distances = {}
for name, model, colour, mark in (("random pairs", flow, "#0072b2", "o"), ("reflow pairs", straight, "#d55e00", "s")):
    end_distances[name] = []
    for n in step_counts:
        end = euler_path(velocity_of(model), start, torch.linspace(1, 0, n + 1).tolist())[0][-1]
        end_distances[name].append(float(torch.cdist(end, points).amin(dim=1).mean()))
    ax.plot(step_counts, end_distances[name], marker=mark, color=colour, label=f"trained on {name}")
ax.set_xscale("log", base=2)
ax.set_xticks(step_counts, step_counts)
ax.set(xlabel="steps", ylabel="distance to the nearest point", ylim=0)
before, after = end_distances["random pairs"][0], end_distances["reflow pairs"][0]
ax.set_title(f"Distance to the data after a single step: {before:.1f}, with reflow {after:.1f}")
ax.legend()
plt.show()
print(f"distance to the data after one step: about {before:.0f}, after reflow about {after:.1f}")

# %% [markdown]
# With eight steps the advantage is gone: straighter trajectories make fewer steps possible, but not better samples.
# (This is one training run of each; the counts change a little with the seed.)
#
# ### Which times to train on
#
# In the plane we drew $t$ uniformly. Large models draw it from a *logit-normal* distribution (arXiv 2403.03206,
# section 3.1): a normally distributed number with mean $m$ and standard deviation $s$, mapped to (0, 1) by the sigmoid.
#
# $$t = \sigma(m + s\, z), \quad z \sim \mathcal{N}(0, 1), \qquad
# \pi(t) = \frac{1}{s \sqrt{2 \pi}}\; \frac{1}{t\,(1 - t)}\;
# \exp\Bigl( -\frac{(\log \frac{t}{1 - t} - m)^2}{2 s^2} \Bigr)$$
#
# This does not change what the best network computes: $v^*(x, t)$ minimises the error at each time separately. It
# changes how often each time is practised, which matters for a network that is not perfect. With $m = 0$ the middle is
# preferred; the miniature was trained with $m = 0.9$ and $s = 1.2$ (`LOGIT_NORMAL` in `training/flow.py`), towards the
# noise, where it is decided what will be where.

# %%
t = torch.linspace(0.001, 0.999, 999)
fig, ax = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
ax.plot(t, torch.ones_like(t), "--", color="0.5", label="uniform")
for (m, s), colour in (((0.0, 1.0), "#0072b2"), ((0.9, 1.2), "#d55e00")):
    density = (-((torch.logit(t) - m) ** 2) / (2 * s**2)).exp() / (s * (2 * torch.pi) ** 0.5 * t * (1 - t))
    ax.plot(t, density, color=colour, label=f"logit-normal, m = {m:g}, s = {s:g}")
    noisy = 1 - torch.special.ndtr((torch.logit(torch.tensor(0.7)) - m) / s)
    print(f"m = {m:g}, s = {s:g}: {noisy:.0%} of the times are above 0.7 (uniform: 30%)")
ax.set(xlabel="time (1 is noise)", ylabel="density", ylim=0)
ax.set_title("The miniature practises times near the noise most")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The miniature's own velocity field
#
# The miniature was trained with the same loss, so we can measure it: for 24 images like those of its training data,
# each with its caption and with an empty caption. (This section always uses the miniature, whatever model you have
# loaded.)

# %%
rng = np.random.default_rng(3)
scenes = [sample_scene(rng, size=(128, 128)) for _ in range(24)]
captions = [caption(scene, rng)[0] for scene in scenes]
base = fe.load("nano-base", device=device)  # the network before guidance was distilled into it (notebook 12)
with torch.no_grad():
    images = torch.cat([to_tensor(render(scene)) for scene in scenes]).to(device)  # [24, 3, 128, 128]
    data = base.autoencoder.encode(images)  # [24, 16, 16, 16]


def model_for(caption: str) -> Callable:
    """The miniature as `model(x, t)` on latents [1, 16, 16, 16], with this caption."""
    text = base.prompt_encoder([caption])
    img_ids, txt_ids = image_ids(16, 16).to(device), text_ids(text.txt.shape[1]).to(device)
    return lambda x, t: unpack(base.flux(pack(x), img_ids, text.txt, txt_ids, t, text.pooled), 16, 16)


loss_times = [0.1, 0.4, 0.7, 0.9, 1.0]
noise = torch.randn(24, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
curves = {"with caption": [], "empty caption": []}
with torch.no_grad():
    for name, texts in zip(curves, (captions, [""] * 24)):
        for model, x0, eps in zip(map(model_for, texts), data.split(1), noise.split(1)):
            losses = [used_loss(model, x0, eps, torch.full((1,), t, device=device)) for t in loss_times]
            curves[name].append(torch.stack(losses).cpu())
curves = {name: torch.stack(curve) for name, curve in curves.items()}  # [24 images, 5 times]
reduction = 1 - curves["with caption"] / curves["empty caption"]
for t, column in zip(loss_times, reduction.T):
    low, median, high = (float(column.quantile(share)) for share in (0.1, 0.5, 0.9))
    print(f"t = {t:.1f}: the caption reduces the loss by {median:.0%} (8 of 10 images: {low:.0%} to {high:.0%})")

fig, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
for (name, curve), colour, mark in zip(curves.items(), ("#0072b2", "#d55e00"), "os"):
    ax.plot(loss_times, curve.mean(0), marker=mark, color=colour, label=name)
ax.set(xlabel="time (1 is noise)", ylabel="loss (mean squared error)", ylim=0)
ax.set_title(f"24 images: the caption reduces the loss most at t = 1, by {median:.0%} (median)")
ax.legend()
plt.show()

# %% [markdown]
# At small and intermediate times the state itself shows the image, and the caption adds little. Near t = 0 the loss
# rises again:
# the velocity depends on the noise, of which the state contains hardly anything.
#
# The explorer shows runs of two prompts from the same noise, projected to a plane through their final images:

# %%
widgets.velocity(pipe, [prompt, "a green star above a yellow ring"], seeds=5, steps=6, progress=False)

# %%
several = [prompt, "a green star above a yellow ring", "a large purple triangle", "a cyan cross", "two orange squares"]
runs = pipe(
    [text for text in several for _ in range(8)], seed=list(range(8)) * 5, steps=6, decode=False, progress=False
)
ratios = used_detour(runs.trajectory.latents)  # [40]
low, median, high = (float(ratios.quantile(share)) for share in (0, 0.5, 1))
print(f"40 trajectories are {median:.2f} times as long as straight lines ({low:.2f} to {high:.2f})")

# %% [markdown]
# Those are five prompts with eight seeds each, in six steps; a path of few steps cuts its corners, so these lengths are
# a little too small. The paths of the miniature are much straighter than those in the plane. A likely reason is that
# in 4,096 dimensions two lines hardly ever come close to each other, and that the prompt tells the network a part of
# what the image will be.

# %% [markdown]
# ## Put your code into the trained model
#
# Your `best` is not limited to the plane: its points can be latents. Give it the first six of the images above, 4,096
# numbers each, and let the pipeline follow *its* velocity instead of the transformer's. `fe.intervene` replaces the
# value at a named point of the model, a *site*. What will the pipeline generate?

# %%
with torch.no_grad():
    known = pipe.autoencoder.encode(images[:6].to(pipe.dtype)).float().flatten(1)  # [6, 4096]
state = {}


def store_state(x: Tensor, ctx) -> Tensor:
    state["x"] = x.flatten(1)
    return x


def best_velocity(v: Tensor, ctx) -> Tensor:
    return used_best(state["x"].float(), ctx.time, known).view_as(v).to(v)


with fe.intervene("sample.x", store_state), fe.intervene("sample.velocity", best_velocity):
    generated = pipe(prompt, seed=[0, 1, 2, 3, 4, 5], height=128, width=128, progress=False)
latents = generated.latents.flatten(1).float()  # [6, 4096]
nearest = torch.cdist(latents, known).argmin(dim=1)  # [6]: the index of the most similar known image
print("seeds 0 to 5 give the known images", [int(i) + 1 for i in nearest])
course.compare("the generated latents and these images'", latents, known[nearest], within=1e-3)
scale = known.norm(dim=1).mean()

predicted_x0 = generated.trajectory.x0.flatten(2).float()  # [20, 6, 4096]
settled = (torch.cdist(predicted_x0, known).amin(-1) < 0.05 * scale).float()  # [20, 6]
decision_step.against(int(settled.argmax(dim=0).median()) + 1)

fig, axes = plt.subplots(2, 6, figsize=(9, 3.3), layout="constrained")
for k in range(6):
    axes[0, k].imshow(render(scenes[k]))
    axes[1, k].imshow(generated.images[k])
for ax, name in zip(axes[:, 0], ("known", "generated")):
    ax.set_ylabel(name)
for ax in axes.flat:
    hide_axes(ax)
fig.suptitle("The exact minimiser of the loss on six images generates only these six")
plt.show()

# %% [markdown]
# Two of the six seeds gave the same image, and one known image was not generated. (The stripes of some shapes
# are lost in the autoencoder, not in the flow.) The image is decided early: at the fourth of twenty steps
# (t = 0.94), the predicted x0 is within 5 % of one of the six in at least half of the runs.
#
# So a network that minimised the loss exactly would have memorised its training set. Everything that we like about a
# flow model, such as a combination that was never in the data, exists because the network does *not* reach that
# minimum.
#
# ## Break it
#
# We make three mistakes with the velocity of the miniature: its sign is reversed, the network gets the time 1 - t, or
# a prediction of the noise takes the place of the velocity. The *judge*, a program that finds shapes and colours in an
# image by geometry, counts for sixteen seeds how often both objects of the prompt are there, and nothing else.

# %%
from fluxedu.models.modulation import timestep_embedding
from fluxedu.nano.judge import detect


def both_objects(image) -> bool:
    found = sorted((thing.color, thing.form) for thing in detect(image).objects)
    return found == [("blue", "square"), ("red", "circle")]


def reversed_time(embedding: Tensor, ctx) -> Tensor:
    wrong_time = 1 - torch.tensor([ctx.time], device=embedding.device)
    return pipe.flux.time_in(timestep_embedding(wrong_time).to(embedding)).view_as(embedding)


def predicted_noise(v: Tensor, ctx) -> Tensor:
    return state["x"].view_as(v) + (1 - ctx.time) * v  # the output of a model that predicts the noise


breaks = {
    "sign: x0 - noise": ("sample.velocity", lambda v, ctx: -v),
    "time: 1 - t": ("vec.time", reversed_time),
    "noise as velocity": ("sample.velocity", predicted_noise),
}
settings = {"seed": list(range(16)), "steps": 8, "trajectory": False, "progress": False}
results = {"original": pipe(prompt, **settings).images}
for name, (site, change) in breaks.items():
    with fe.intervene("sample.x", store_state), fe.intervene(site, change):
        results[name] = pipe(prompt, **settings).images
for name, some in results.items():
    print(f"{name:18} {sum(map(both_objects, some)):2} of 16 images show a red circle, a blue square and nothing else")

fig, axes = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for column, (name, some) in zip(axes.T, results.items()):
    column[0].set_title(name, fontsize=9)
    for ax, image in zip(column, some):
        ax.imshow(image)
        ax.axis("off")
fig.suptitle("Seeds 0 and 1: three mistakes with the velocity, none of which raises an error", fontsize=10)
plt.show()

# %% [markdown]
# It is easy to blame the training for the results of such mistakes. When samples look odd, check the sign, the time and
# the kind of prediction first.
#
# ## In five lines
#
# 1. `x_t = (1 - t) x0 + t noise`, `v = noise - x0`, loss = mean of `(network - v)²`. Time 1 is noise.
# 2. The network learns the marginal velocity: the mean over all lines that pass through a point at the same time. It
#    moves the whole density from noise to data.
# 3. Training lines can pass through the same point at the same time, trajectories cannot; so trajectories are curved.
# 4. Training on pairs from the flow itself (reflow) straightens trajectories, and then few steps suffice.
# 5. For a finite set of images the exact minimum is known, and it generates only these images.
#
# **Questions people ask**: *Which sign does the velocity have?* (friendly-stable-audio-tools issue 9) With t = 1 as
# noise it is `noise - x0`, and the sampler's step `t_next - t` is negative. In code whose time grows towards the image,
# both signs are reversed. *How was FLUX trained?* (flux issue 68 asks for a report) As a rectified flow, according to
# its model cards; data, distribution of times and settings are not published. The official sampler shows the sign, the
# schedule and the kind of prediction: `denoise` in `sampling.py`, line 351 at commit 802fb47, is
# `img = img + (t_prev - t_curr) * pred`, as here.
#
# **Read**: Flow Straight and Fast, arXiv 2209.03003 (the second training is its *reflow*) · Scaling Rectified Flow
# Transformers, arXiv 2403.03206 · `cloneofsimo/minRF`, `rf.py` · ours: `training/flow.py`.

# %%
fe.score()
