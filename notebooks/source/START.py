# %% [markdown]
# # Start here: a FLUX that draws while you watch
#
# **Click into the cell below and press Shift + Enter.** (Or choose *Run → Run All Cells* in the menu.) After a few
# seconds you can type a prompt and see it drawn.
#
# FLUX.1 is a text-to-image model with 12 billion parameters. This one is a *miniature*: the same architecture and the
# same code with 4.4 million parameters, trained on images of coloured shapes and letters. It runs on a laptop's CPU.

# %%
import fluxedu as fe
from fluxedu import course
from fluxedu.course.start import Gallery, PromptBox

pipe = fe.load(device=course.begin())  # a GPU if there is one
PromptBox(pipe)

# %% [markdown]
# **What you see.** The image begins as noise. In each of 20 steps, the model predicts in which direction the image
# lies, and the *state* moves a little in that direction. The *predicted x0* is the image that the model expects at that
# moment. Press play to see the steps again. Below them, point at a patch of the image or at a word: *attention* shows
# from which other patches and words it takes information.
#
# **Try it.** Change the colour of one object. Exchange the two objects. Ask for a cat, and read why you do not get one.
#
# ## All explorers
#
# An explorer is an interactive figure that answers one question about the model. Open a question to run it here; some
# take a few seconds. Each belongs to a notebook of the course, and you can call it in a notebook of your own.

# %%
Gallery(pipe)

# %% [markdown]
# ## The course
#
# Thirty-three notebooks, thirty-two hours in all. You write the parts of the model yourself, and most of your answers then
# run inside the trained model. If you know PyTorch, begin with 00.
#
# | notebook | minutes |
# |---|---|
# | [00 · An image from a sentence](00-a-picture-from-a-sentence.ipynb) | 45 |
# | [00b · Instruments](00b-instruments.ipynb) | 45 |
# | [01 · Latents: the autoencoder](01-latents.ipynb) | 60 |
# | [01b · Packing into tokens](01b-packing.ipynb) | 60 |
# | [02 · CLIP's text encoder](02-clip.ipynb) | 60 |
# | [02b · Contrastive learning](02b-contrastive-learning.ipynb) | 60 |
# | [03 · T5's layers](03-t5.ipynb) | 60 |
# | [03b · Relative positions and probes](03b-relative-positions.ipynb) | 60 |
# | [04 · Rotary positions](04-rotary-positions.ipynb) | 60 |
# | [05 · Time](05-time.ipynb) | 60 |
# | [05b · Modulation](05b-modulation.ipynb) | 60 |
# | [06 · Attention](06-attention.ipynb) | 60 |
# | [06b · Joint attention](06b-joint-attention.ipynb) | 60 |
# | [07 · The double-stream block](07-the-double-stream-block.ipynb) | 60 |
# | [07b · Why two streams?](07b-why-two-streams.ipynb) | 50 |
# | [08 · The single-stream block](08-the-single-stream-block.ipynb) | 60 |
# | [08b · What single blocks add](08b-what-single-blocks-add.ipynb) | 60 |
# | [09 · The whole transformer](09-the-whole-transformer.ipynb) | 50 |
# | [09b · Parameters and layouts](09b-parameters-and-layouts.ipynb) | 60 |
# | [10 · Rectified flow in the plane](10-rectified-flow.ipynb) | 60 |
# | [10b · The trained velocity field](10b-velocity-field.ipynb) | 60 |
# | [11 · Sampling](11-sampling.ipynb) | 60 |
# | [12 · Guidance](12-guidance.ipynb) | 45 |
# | [12b · Embedded guidance](12b-embedded-guidance.ipynb) | 50 |
# | [13 · Maps and lenses](13-look-inside.ipynb) | 60 |
# | [13b · Removing and patching](13b-patching.ipynb) | 55 |
# | [14 · The family](14-the-family.ipynb) | 60 |
# | [14b · Editing](14b-editing.ipynb) | 60 |
# | [14c · LoRA](14c-lora.ipynb) | 60 |
# | [15 · The arena](15-the-arena.ipynb) | 60 |
# | [15b · How sure are we?](15b-how-sure-are-we.ipynb) | 60 |
# | [16 · From FLUX.1 to FLUX.2](16-from-flux1-to-flux2.ipynb) | 60 |
# | [16b · Latents, schedule and cost of FLUX.2](16b-what-flux2-costs.ipynb) | 50 |
#
# Notebook 13 records any value inside the model with a line of code; 14c trains nothing and still makes a LoRA. The
# glossary, recipes and answers to common questions are in the folder `docs/` of the repository.
