# %% [markdown]
# # 07 · The double-stream block
#
# **How do text and image pass through one block?** In its first blocks FLUX processes text tokens and image tokens in
# two separate *streams*: each has its own weights, and they meet in one joint attention. You will write the block, with
# functions for one stream that are used twice, and put it into the trained model.
#
# Afterwards you can say what the two streams share and what they do not, and whether attention or MLP adds more to
# each stream.
#
# 60 minutes · needs notebooks 05b and 06b

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models.attention import SelfAttention, rotate
from fluxedu.models.blocks import MLP
from fluxedu.models.modulation import Modulation
from fluxedu.widgets.contributions import measure_contributions, rms_over_tokens
from fluxedu.widgets.streams import streams

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
# We measure the size of a token by the root mean square of its numbers. The *gate* is the factor with which a block
# multiplies what it adds to a token. The *judge* is a program that reads shapes, colours and positions from an image.

# %%
larger_tokens = fe.predict("After the double blocks, which tokens are larger: 'text' or 'image'?", "text")  # answer
larger_term = fe.predict(
    "What adds more to text tokens in the last double block: 'attention' or 'MLP'?", "MLP"
)  # answer
blending = fe.predict(
    "The gates form a weighted mean of old and new, (1 - gate) x + gate f. Of 40 images, are 'none', 'some' or 'most' "
    "right?",
    "none",
)  # answer

# %% [markdown]
# ## Build it
#
# Each stream does two things: before the joint attention it computes q, k and v, and after it, it adds the attention
# output and runs its MLP. Both are functions of a single stream, so you write each once. `mod` holds the six modulation
# vectors of notebook 05b: shift, scale and gate for the attention, and the same for the MLP. Let
#
# $$\tilde x = (1 + \text{scale}) \odot \mathrm{LN}(x) + \text{shift}$$
#
# be the normalised and modulated tokens. With $g_1$ and $g_2$ for the two gates, each stream computes
#
# $$x' = x + g_1 \odot W_o\, o \qquad x'' = x' + g_2 \odot \mathrm{MLP}(\tilde x')$$
#
# where $o$ are this stream's rows of the output of the joint attention, which reads the $\tilde x$ of both streams.

# %% exercise="double.enter"

# %% exercise="double.leave"
# The gate multiplies what is added to the stream. Some descriptions say that it forms a weighted mean of old and new,
# but the old value of the stream is always kept in full.

# %% [markdown]
# The joint attention, which you wrote in notebook 06b, is the only place where text and image exchange information. It
# works on one sequence of tokens, text first, and does not distinguish which stream a query or key came from. Its map
# has four parts, and one softmax per row over both streams' keys: a patch that attends more to text attends less to
# patches.
#
# $$\begin{pmatrix} o_{\text{txt}} \\ o_{\text{img}} \end{pmatrix} = \begin{pmatrix} P_{\text{txt, txt}} &
# P_{\text{txt, img}} \\ P_{\text{img, txt}} & P_{\text{img, img}} \end{pmatrix} \begin{pmatrix} v_{\text{txt}} \\
# v_{\text{img}} \end{pmatrix}, \qquad \sum_j P_{ij} = 1$$
#
# Now the block: the same three modules twice, and your two functions. `plan` computes the modulation of both streams
# from `vec`; the model calls it before the blocks run.

# %% exercise="double.block"

# %% [markdown]
# Compare yours with the library's, with trained weights and the tokens of a real step. The inputs are recorded at their
# *sites*, the named points of the model:

# %%
config = pipe.flux.config
block = pipe.flux.double_blocks[1]
with fe.record("double.1.img", "double.1.txt", "double.1.attn.rope", "vec", steps=10) as rec:  # index 0 is step 10
    pipe(prompt, seed=4, progress=False)
img, txt, vec = (rec[name].at(step=0).tensor[None].to(device) for name in ("double.1.img", "double.1.txt", "vec"))
rope = rec["double.1.attn.rope"].at(step=0).tensor[None, None].to(device)
for name, value in {"image": img, "text": txt, "vec": vec, "rotations": rope}.items():
    print(f"{name:9}", tuple(value.shape))

with torch.no_grad():
    theirs = block(img, txt, block.plan(vec), rope)
    if fe.passed("double.enter", "double.leave", "double.block"):
        mine = Block(config.hidden_size, config.num_heads, config.mlp_hidden).to(device, pipe.dtype)
        mine.load_state_dict(block.state_dict())
        ours = mine(img, txt, mine.plan(vec), rope)
        for stream, a, b in zip(("image", "text"), ours, theirs):
            course.compare(f"{stream}: your block and the library's", a, b)

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces both double blocks of the running pipeline by yours and copies the trained weights into them by
# name. The image must stay the same.

# %%
if fe.passed("double.enter", "double.leave", "double.block"):
    with fe.swap("double.*", lambda old: Block(config.hidden_size, config.num_heads, config.mlp_hidden), pipe):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your blocks and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## See it
#
# How different are the tokens of the two streams? Compare the sizes of text and image tokens, the root mean square of
# their numbers, through all blocks of the miniature, and what the last double block adds to them.

# %%
sizes, added, _ = measure_contributions(pipe, prompt, seed=4, progress=False)
txt_len = pipe.prompt_encoder.t5_tokenizer.length
step, blocks = 10, sizes.coords["block"]
token_ranges = {"text": slice(0, txt_len), "image": slice(txt_len, None)}
colours = {"text": "#0072B2", "image": "#D55E00"}

fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.3), layout="constrained", width_ratios=[1.15, 1])
for name, tokens in token_ranges.items():
    left.plot(rms_over_tokens(sizes.tensor[:, step], tokens), "o-", label=name, color=colours[name])
left.set_xticks(range(len(blocks)), [b.replace(".", "\n") for b in blocks], fontsize=8)
left.set(xlabel="block that the tokens enter", ylabel="root mean square of a token", ylim=0)
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
# This is one step of one run. The same for 40 prompts, each with its own seed, in two parts of the run of 20 steps
# (medians; for the size, with a 95 % interval):

# %%
stored = evidence.load("blocks")["sizes"]
for block_name in ("double.0", "double.1"):
    for stream in ("text", "image"):
        for third in ("first third", "last third"):
            row = stored[block_name][third][stream]
            print(f"{block_name} {stream:5} {third:11} size {evidence.number(row['size'])}",
                  f"· attention adds {row['attention adds']['value']:.2f}, MLP {row['MLP adds']['value']:.2f}")  # fmt: skip
for third in ("first third", "last third"):
    after = (f"{stream} {evidence.number(stored['single.0'][third][stream]['size'])}" for stream in ("text", "image"))
    print(f"after the double blocks, {third}: size of", ", ".join(after))

# %% [markdown]
# The difference holds for both parts of the run. Text tokens are 2.3 to 3.5 times as large as image tokens when they
# enter a double block, and 3.7 to 8.3 times after the last one (the last two lines). The MLP, which processes each
# token separately, adds more to them than the attention. The image tokens start small, and the attention of the first
# block adds to them about two to three times their size: this is where they first get information from elsewhere. Size
# alone is no reason for two sets of weights, since every layer reads normalised tokens; notebook 07b asks what is.
#
# The explorer shows these sizes for each token: choose which value shades words and patches, then move through blocks
# and time (Tab, then the arrow keys; or use the mouse). In `double.1`, shade by *attention adds*: to which words does
# it add most? Then choose *MLP adds*.

# %%
streams(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Break it
#
# Two mistakes that are easy to make in `leave`, with the trained weights: the gates form a weighted mean of old and
# new (“gate blends” below), or the MLP reads the tokens from before the attention (“MLP in parallel”). 40 prompts, each
# with its own seed; the judge says how many images are right in everything that the prompt says (share, with a 95 %
# interval). The controls are the model as it is, and the same prompts with other seeds.

# %%
parts = evidence.load("parts")
for name in ("nothing", "another seed", "double: gate blends", "double: MLP in parallel"):
    print(f"{name:24} right: {evidence.percent(parts[name]['everything right'])}")
share = parts["double: gate blends"]["everything right"]["value"]
blending.against("none" if share == 0 else "most" if share > 0.5 else "some")

# %% [markdown]
# Neither mistake raises an error, but these weights were trained for $x + g f$ with the MLP second. You can produce the
# first mistake with your own code: change `leave`, run the swap cell again and look at `out.images[0]`.
#
# ## In five lines
#
# 1. A double block applies the same functions to each stream, before and after one joint attention.
# 2. The streams share no weights, and they exchange information only in the attention.
# 3. A residual step is x + gate · f(x): first the attention, then the MLP on the new x.
# 4. In the miniature the text tokens are the larger ones, and the MLP adds more to them than the attention.
# 5. To image tokens the attention adds more in the first block; in the second it adds more early in the run, and late
#    in the run about as much as the MLP.
#
# **Questions people ask**: *How do I get an attention map?* (attention-map-diffusers 11) Not with a forward hook, since
# the softmax is inside the fused kernel. `fe.record("double.1.attn.map")` computes it exactly from q, k and the
# log-sum-exp. *Is the padding masked?* (flux pull requests 507, 511, 512) No: tokens attend to it as to any word, and
# the sizes of text tokens above include it.
#
# **Read**: *Scaling Rectified Flow Transformers*, arXiv 2403.03206, section 4 · `black-forest-labs/flux`,
# `modules/layers.py`, `DoubleStreamBlock` · ours: `fluxedu/models/blocks.py`.

# %%
fe.score()
