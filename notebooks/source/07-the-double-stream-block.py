# %% [markdown]
# # 07 · The double-stream block
#
# **Why two streams?** In its first blocks FLUX processes text tokens and image tokens in two separate *streams*: each
# has its own weights, and they meet in one joint attention. You will write the block, with functions for one stream
# that are used twice, and put it into the trained model. Then you replace one stream's weights by the other's and see
# what happens.
#
# Afterwards you can say what the two streams share and what they do not, what two sets of weights cost, and whether
# attention or MLP adds more to each stream.
#
# 50 minutes · needs notebooks 05 and 06

# %%
import copy
from contextlib import ExitStack, contextmanager

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models import FluxConfig
from fluxedu.models.attention import SelfAttention
from fluxedu.models.blocks import MLP, DoubleStreamBlock
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import Modulation
from fluxedu.models.attention import rotate

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
reference = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double")

# %% [markdown]
# FLUX.1 has 19 of these blocks, the miniature has two. Every operation except attention is applied to each token
# separately, so text and image can use different weights everywhere else.
#
# ## Predict
#
# We measure the size of a token by the root mean square of its numbers. For the last question, a change of less than 1
# % of the latent's length counts as 'not', and below 10 % as 'a little'.

# %%
operations_ratio = fe.predict(
    "Two sets of weights instead of one: how many times as many operations does the block need?", 1
)  # answer
larger_tokens = fe.predict("After the double blocks, which tokens are larger: 'text' or 'image'?", "text")  # answer
larger_term = fe.predict(
    "What adds more to text tokens in the last double block: 'attention' or 'MLP'?", "MLP"
)  # answer
shared_weights = fe.predict(
    "The text stream gets the image stream's weights. Does the latent change 'not', 'a little' or 'much'?", "much"
)  # answer

# %% [markdown]
# ## Build it
#
# Each stream does two things: before the joint attention it computes q, k and v, and after it, it adds the attention
# output and runs its MLP. Both are functions of a single stream, so you write each once. `mod` holds the six modulation
# vectors of notebook 05. With $g_1$ and $g_2$ for the two gates, and $\tilde x$ for a layer-normalised, scaled and shifted
# $x$, each stream computes
#
# $$x' = x + g_1 \odot W_o\, o \qquad x'' = x' + g_2 \odot \mathrm{MLP}(\tilde x')$$
#
# where $o$ are this stream's rows of the output of the joint attention, which reads the $\tilde x$ of both streams.

# %% exercise="double.enter"

# %% [markdown]
# The joint attention is the only place where text and image exchange information. It works on one sequence of tokens,
# text first, and does not distinguish which stream a query or key came from. Its map has four parts, and one softmax per
# row over both streams' keys: a patch that attends more to text attends less to patches.
#
# $$\begin{pmatrix} o_{\text{txt}} \\ o_{\text{img}} \end{pmatrix} = \begin{pmatrix} P_{\text{txt, txt}} &
# P_{\text{txt, img}} \\ P_{\text{img, txt}} & P_{\text{img, img}} \end{pmatrix} \begin{pmatrix} v_{\text{txt}} \\
# v_{\text{img}} \end{pmatrix}, \qquad \sum_j P_{ij} = 1$$

# %% exercise="double.joint"

# %% exercise="double.leave"
# The gate multiplies what is added to the stream. Some descriptions say that it blends old and new, but the old value
# of the stream is always kept in full.

# %% [markdown]
# Now the block: the same three modules twice, and your three functions. `plan` computes the modulation of both streams
# from `vec`; the model calls it before the blocks run.

# %% exercise="double.block"

# %% [markdown]
# Compare yours with the library's, with trained weights and the tokens of a real step:

# %%
config = pipe.flux.config
block = pipe.flux.double_blocks[1]
with fe.record("double.1.img", "double.1.txt", "double.1.attn.rope", "vec", steps=10) as rec:
    pipe(prompt, seed=4, progress=False)
img, txt, vec = (rec[name].at(step=0).tensor[None].to(device) for name in ("double.1.img", "double.1.txt", "vec"))
rope = rec["double.1.attn.rope"].at(step=0).tensor[None, None].to(device)
print(
    "image", tuple(img.shape), "· text", tuple(txt.shape), "· vec", tuple(vec.shape), "· rotations", tuple(rope.shape)
)

with torch.no_grad():
    theirs = block(img, txt, block.plan(vec), rope)
    if fe.passed("double.block"):
        mine = Block(config.hidden_size, config.num_heads, config.mlp_hidden).to(device, pipe.dtype)
        mine.load_state_dict(block.state_dict())
        ours = mine(img, txt, mine.plan(vec), rope)
        for stream, a, b in zip(("image", "text"), ours, theirs):
            course.compare(f"{stream}: your block and the library's", a, b)

# %% [markdown]
# ## What two streams cost
#
# They need twice the memory for weights, but no more computation: each token goes through one set of weights only. One
# stream has the matrices for q, k and v ($3D^2$ weights), the attention's projection ($D^2$), the MLP ($8D^2$) and six
# modulation vectors ($6D^2$). A matrix of $W$ weights costs $2W$ operations per token, so with $L$ text tokens and $N$
# image tokens
#
# $$\text{weights} = 2 \cdot 18\, D^2 \qquad \text{operations} \approx 2 \cdot 12\, D^2\, (L + N) + 4 D\, (L + N)^2$$
#
# where the second term is the attention, and the modulation, computed once per image, is left out. (On a CPU the counter
# below does not see the fused attention, and it counts the modulation: 59.0 million for the first term, 0.6 million for
# the modulation.)
# Count the operations of the block as it is, and with the image stream's weights for both streams.

# %%
from torch.utils.flop_counter import FlopCounterMode


def with_shared_weights(block: nn.Module, source: str, parts: tuple[str, ...] = ("mod", "attn", "mlp")) -> nn.Module:
    """A copy of a double block in which both streams use the `parts` of the stream `source`."""
    shared_block = copy.deepcopy(block)
    target = {"img": "txt", "txt": "img"}[source]
    for part in parts:
        setattr(shared_block, f"{target}_{part}", getattr(shared_block, f"{source}_{part}"))
    return shared_block


operations = {}
for name, variant in {"two streams": block, "one set of weights": with_shared_weights(block, "img")}.items():
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        variant(img, txt, variant.plan(vec), rope)
    operations[name] = flops.get_total_flops()
    print(f"{name:18} {sum(p.numel() for p in variant.parameters()):>9,} weights, {operations[name]:,} operations")
operations_ratio.against(operations["two streams"] / operations["one set of weights"])

with meta_init():  # names and shapes only
    official = DoubleStreamBlock(FluxConfig.variant("dev"))
print(f"a double block of FLUX.1 has {sum(p.numel() for p in official.parameters()):,} weights, half of them for text")

# %% [markdown]
# At 1024 × 1024, FLUX.1-dev has 4,096 image tokens and 512 text tokens: half of the block's weights serve a ninth of
# the tokens. What could justify that memory?
#
# ## See it
#
# One possible reason is that the tokens of the two streams are very different. Compare the sizes of text and image
# tokens, the root mean square of their numbers, through all blocks of the miniature.

# %%
from fluxedu.widgets.contributions import measure_contributions, rms_over_tokens

sizes, added, _ = measure_contributions(pipe, prompt, seed=4, progress=False)
txt_len = pipe.prompt_encoder.t5_tokenizer.length
step, blocks = 10, sizes.coords["block"]
token_ranges = {"text": slice(0, txt_len), "image": slice(txt_len, None)}
colours = {"text": "#0072B2", "image": "#D55E00"}

fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.3), layout="constrained", width_ratios=[1.15, 1])
for name, tokens in token_ranges.items():
    left.plot(rms_over_tokens(sizes.tensor[:, step], tokens), "o-", label=name, color=colours[name])
left.set_xticks(range(len(blocks)), [b.replace(".", "\n") for b in blocks], fontsize=8)
left.set_xlabel("block that the tokens enter")
left.set_ylabel("root mean square of a token")
left.set_ylim(bottom=0)
left.legend()
entering = [float(rms_over_tokens(sizes.tensor[config.depth, step], tokens)) for tokens in token_ranges.values()]
size_ratio = entering[0] / entering[1]
left.set_title(f"After the double blocks, text tokens are {size_ratio:.1f} times as large as image tokens", fontsize=9)

bars = {}
for name, tokens in token_ranges.items():
    for i, part in enumerate(("attention", "MLP")):
        bars[f"{name}\n{part}"] = float(rms_over_tokens(added.tensor[1, i, step], tokens))
right.bar(list(bars), list(bars.values()), color=[colours[label.split("\n")[0]] for label in bars])
right.set_ylabel("size of what double.1 adds")
to_text = bars["text\nMLP"] / bars["text\nattention"]
right.set_title(f"To text tokens, the MLP adds {to_text:.1f} times as much as the attention", fontsize=9)
plt.show()

larger_tokens.against("text" if entering[0] > entering[1] else "image")
larger_term.against("MLP" if to_text > 1 else "attention")

# %% [markdown]
# This is one step of one run. The same for 40 prompts, each with its own seed, in three parts of the run of 20 steps:

# %%
stored = evidence.load("blocks")["sizes"]
for block_name in ("double.0", "double.1"):
    for stream in ("text", "image"):
        for third in ("first third", "last third"):
            row = stored[block_name][third][stream]
            print(f"{block_name} {stream:5} {third:11} size {evidence.number(row['size'])}",
                  f"· attention adds {row['attention adds']['value']:.2f}, MLP {row['MLP adds']['value']:.2f}")  # fmt: skip

# %% [markdown]
# So the difference holds for all parts of the run. Text tokens are 2.3 to 3.5 times as large as image tokens, and the
# MLP, which processes each token separately, adds more to them than the attention. The image tokens start small, and the
# attention of the first block adds to them about two to three times their size: this is where they first get information from
# elsewhere. Size alone is no reason for two sets of weights, since every layer reads normalised tokens. But attention and
# MLP contribute differently to the two streams, so two sets may suit them better.
#
# The explorer shows these sizes for each token: choose which value shades words and patches, then move through blocks
# and time (Tab, then the arrow keys; or use the mouse). In `double.1`, shade by *attention adds*: to which words does
# it add most? Then choose *MLP adds*.

# %%
from fluxedu.widgets.streams import streams

streams(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces both double blocks of the running pipeline by yours and copies the trained weights into them by
# name. The image must stay the same.

# %%
if fe.passed("double.block"):
    with fe.swap("double.*", lambda old: Block(config.hidden_size, config.num_heads, config.mlp_hidden), pipe):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your blocks and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# We take something away from both double blocks and generate the image again with the same seed. We measure the
# distance of the final latent from the original one, relative to its length. For comparison, the first line has the
# distance of an unrelated image.

# %%
from fluxedu.instruments.ablation import ablate


@contextmanager
def share_weights(source: str, *parts: str):
    """Both streams of all double blocks use the `parts` of the stream `source`."""
    with ExitStack() as stack:
        for i, block in enumerate(pipe.flux.double_blocks):
            stack.enter_context(fe.swap(f"double.{i}", with_shared_weights(block, source, parts), pipe))
        yield


def hide_text_from_image(attn_map, ctx):
    """Set the attention from patches to text to 0 and rescale each row to sum to 1."""
    weights = attn_map.weights().clone()  # [B, H, L + N, L + N], one row per query
    weights[..., ctx.stream_slice("img"), ctx.stream_slice("txt")] = 0
    return weights / weights.sum(-1, keepdim=True)


breaks = {
    "text uses image weights": share_weights("img", "mod", "attn", "mlp"),
    "image uses text weights": share_weights("txt", "mod", "attn", "mlp"),
    "text uses image MLPs": share_weights("img", "mlp"),
    "text stream skipped": ablate("double.*", streams="txt"),
    "image stream skipped": ablate("double.*", streams="img"),
    "no attention to text": fe.intervene("double.*.attn.map", hide_text_from_image),
}
outs, changes = [reference], {}


def report(name: str, out) -> None:
    """Print the distance of the latent from the original one."""
    changes[name] = float((out.latents - reference.latents).norm() / reference.latents.norm())
    print(f"{name:28} " + (f"{changes[name]:.0%}" if changes[name] < 3 else "more than 300%"))


report("another prompt and seed", pipe("a green triangle", seed=9, progress=False))
for name, change in breaks.items():
    with change:
        outs.append(pipe(prompt, seed=4, progress=False))
    report(name, outs[-1])

by_sharing = changes["text uses image weights"]
shared_weights.against("much" if by_sharing > 0.1 else "a little" if by_sharing > 0.01 else "not")

# %%
from textwrap import fill

fig, axes = plt.subplots(1, 7, figsize=(11, 2.3), layout="constrained")
for ax, out, name in zip(axes, outs, ["unchanged", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(fill(name, 16), fontsize=9)
    ax.axis("off")
fig.suptitle(f"With the image stream's weights for the text, the latent changes by {by_sharing:.0%}", fontsize=11)
plt.show()

# %% [markdown]
# An unrelated image is at 114 %. With the other stream's weights the distance is larger than that, so the image is lost,
# and larger numbers mean nothing more; skipping a stream stays below. Look at the last image, too: although patches cannot attend to text in these blocks, the scene is drawn, because patches attend to the text in
# the single blocks as well. These are the topic of the next notebook.
#
# The experiment shows that the trained weights of one stream do not fit the other. It does not show that a model
# *needs* two streams: for that, one would have to train two models, one with shared and one with separate weights, and
# compare them. Moreover, the lines above come from a single seed, and with another seed their order can be different.
# The distance counts every patch alike, background included, so look at the images as well.
#
# ## In five lines
#
# 1. A double block applies the same functions to each stream, before and after one joint attention.
# 2. The streams share no weights, and they exchange information only in the attention.
# 3. Two sets of weights double the memory and do not change the amount of computation.
# 4. In the miniature the text tokens are the larger ones, and the MLP adds more to them than the attention. To image
#    tokens the attention adds more in the first block; in the second it adds more early in the run only.
# 5. A residual step is x + gate · f(x): first the attention, then the MLP on the new x.
#
# **Questions people ask**: *Where does FLUX explain its design?* Hardly anywhere: it was released without a report
# (flux issue 68), and the later report on Kontext (arXiv 2506.15742) describes the architecture without its reasons.
# The design is MMDiT's, from *Scaling Rectified Flow Transformers* (arXiv 2403.03206), which compares it with one set
# of weights for both. *How do I get an attention map?* (attention-map-diffusers 11) Not with a forward hook, since the
# softmax is inside the fused kernel. `fe.record("double.1.attn.map")` computes it exactly from q, k and the
# log-sum-exp. *Is the padding masked?* (flux pull requests 507, 511, 512) No: tokens attend to it as to any word, and
# the sizes of text tokens above include it.
#
# **Read**: *Scaling Rectified Flow Transformers*, arXiv 2403.03206, section 4 · `black-forest-labs/flux`,
# `modules/layers.py`, `DoubleStreamBlock` · ours: `fluxedu/models/blocks.py`.

# %%
fe.score()
