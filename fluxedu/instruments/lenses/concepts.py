"""Where concepts are in the image, whether or not the prompt names them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.instruments.lenses.attention import check_words, tokens_of
from fluxedu.instruments.lenses.run import LensRun, lens, patch_grid, stack_blocks, unfold_patches
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import StepKey
from fluxedu.instruments.reductions import StepReduction, Value, step_mean, to_named
from fluxedu.instruments.tokens import text_tokens
from fluxedu.models.attention import merge_heads, split_heads
from fluxedu.models.modulation import layer_norm, modulate
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import Steps, current_context


@lens
def concept_maps(
    pipe: FluxPipeline, prompt: str, words: Sequence[str], *, at_steps: Steps = None, added: bool | None = None
) -> LensRun:
    """How much each patch resembles each word: axes ``block, word, row, column``.

    It compares the attention output of each patch with that of each word, averaged over ``at_steps`` (all steps by
    default); it does not use attention weights. Only the difference between words tells where they are, so give at
    least two, such as an object and "background".
    added: whether the words are added to the run as concept tokens; by default only if the prompt lacks one of them.

    Words of the prompt: the softmax over the words of the cosine similarity divided by 0.1, which sums to 1.
    Added words: the dot product, after ConceptAttention (arXiv 2502.04320, which takes the softmax over the words). T5
    encodes each word alone, and its tokens pass through the blocks as text tokens do, with the modulation of this run.
    They attend to one another and to the image only; no other token attends to them, so the image stays the same. The
    paper measures double blocks; here the tokens pass through the single blocks as well.
    """
    check_words(words)
    if added is None:
        try:
            tokens_of(pipe, prompt, words)
        except WordNotInPrompt:
            added = True
    maps = yield from (_added if added else _of_prompt)(pipe, prompt, words, at_steps)
    return maps


def _added(pipe: FluxPipeline, prompt: str, words: Sequence[str], steps: Steps) -> LensRun:
    """The maps of words that are added to the run."""
    concepts = _ConceptTokens(pipe, words)
    sites = [f"double.*.{name}" for name in ("txt_mod.*", "attn.k", "img_attn.v", "heads")]
    sites += [f"single.*.{name}" for name in ("shift", "scale", "gate", "attn.k", "v", "heads")]
    rec = record(*sites, passes="prompted", steps=steps, reduce=[concepts, step_mean])
    out = yield rec
    maps = stack_blocks(rec, pipe, "heads")
    shares = Named(maps.tensor.transpose(1, 2), ("block", "word", "image"), maps.coords | {"word": list(words)})
    return unfold_patches(shares, "image", patch_grid(out.latents.shape))


class _ConceptTokens(StepReduction):
    """Concept tokens on their way through the blocks; the attention output of each block is reduced to its map.

    A block's modulation, keys and values pass before its attention output, and are held until then. The sub-modules of
    a block are called one by one, since other instruments would see the sites of the whole block.
    """

    def __init__(self, pipe: FluxPipeline, words: Sequence[str]):
        encoder, self.flux = pipe.prompt_encoder, pipe.flux
        tokens = [text_tokens(encoder.tokenizer, word) for word in words]
        if not all(tokens):
            raise InstrumentError(f"each of words must be a text with at least one token, not {describe(words)}.")
        with torch.no_grad():
            txt = encoder(list(words)).txt  # each word alone
        self.txt = torch.cat([txt[i, indices] for i, indices in enumerate(tokens)])[None]  # [1, M, context_in_dim]
        self.lengths = [len(indices) for indices in tokens]
        self.x: Tensor | None = None  # [1, M, D] the concept tokens as they enter the block
        self.sites: dict[str, Tensor] = {}  # the latest value of each site, by the name after the block's

    def __call__(self, value: Value, site: str, key: StepKey) -> Named | None:
        kind, number, name = site.split(".", 2)
        self.sites[name] = to_named(value).tensor
        if name != "heads":
            return None
        if site == "double.0.heads":  # a model evaluation begins
            self.x = self.flux.txt_in(self.txt)
        txt_len = current_context().txt_len
        attn_out = (self.pass_double if kind == "double" else self.pass_single)(int(number), txt_len).float()
        of_words = torch.stack([part.mean(1) for part in attn_out.split(self.lengths, dim=1)], dim=1)  # [1, words, D]
        of_image = merge_heads(self.sites["heads"])[:, txt_len:].float()  # [1, N, D]
        return Named(of_image @ of_words.transpose(1, 2), ("batch", "image", "word"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, img_v: Tensor, txt_len: int) -> Tensor:
        """The concepts attend to one another and to the image. Their position ids are 0: RoPE does not rotate them."""
        k = torch.cat([k, self.sites["attn.k"][:, :, txt_len:]], dim=2)
        return merge_heads(F.scaled_dot_product_attention(q, k, torch.cat([v, img_v], dim=2)))  # [1, M, D]

    def pass_double(self, number: int, txt_len: int) -> Tensor:
        """The concept tokens pass through a double block, as text tokens do; returns their attention output."""
        block, sites = self.flux.double_blocks[number], self.sites
        attn_in = modulate(layer_norm(self.x), sites["txt_mod.shift1"], sites["txt_mod.scale1"])
        q, k, v = split_heads(block.txt_attn.qkv(attn_in), 3, block.txt_attn.num_heads)
        attn_out = self.attend(*block.txt_attn.norm(q, k), v, sites["img_attn.v"], txt_len)
        x = self.x + sites["txt_mod.gate1"] * block.txt_attn.proj(attn_out)
        mlp_in = modulate(layer_norm(x), sites["txt_mod.shift2"], sites["txt_mod.scale2"])
        widen, activation, narrow = block.txt_mlp
        self.x = x + sites["txt_mod.gate2"] * narrow(activation(widen(mlp_in)))
        return attn_out

    def pass_single(self, number: int, txt_len: int) -> Tensor:
        """The same for a single block."""
        block, sites = self.flux.single_blocks[number], self.sites
        h = block.linear1(modulate(layer_norm(self.x), sites["shift"], sites["scale"]))
        qkv, hidden = h.split(block.widths, dim=-1)
        q, k, v = split_heads(qkv, 3, block.num_heads)
        attn_out = self.attend(*block.norm(q, k), v, sites["v"][:, :, txt_len:], txt_len)
        out = block.linear2(torch.cat([attn_out, block.activation(hidden)], dim=-1))
        self.x = self.x + sites["gate"] * out
        return attn_out


def _of_prompt(pipe: FluxPipeline, prompt: str, words: Sequence[str], steps: Steps) -> LensRun:
    """The maps of words of the prompt."""
    word_tokens = tokens_of(pipe, prompt, words)

    def similarity(value: Value) -> Named:
        heads = to_named(value).tensor  # [B, H, T, d]
        attn_out = torch.nn.functional.normalize(heads.transpose(1, 2).flatten(2).float(), dim=-1)  # [B, T, D]
        of_words = torch.stack([attn_out[:, indices].mean(1) for indices in word_tokens], dim=1)  # [B, words, D]
        of_image = attn_out[:, current_context().txt_len :]  # [B, N, D]
        return Named(of_image @ of_words.transpose(1, 2), ("batch", "image", "word"))

    reduce = [similarity, step_mean]
    rec = record("double.*.heads", "single.*.heads", passes="prompted", steps=steps, reduce=reduce)
    out = yield rec
    maps = stack_blocks(rec, pipe, "heads")
    coords = maps.coords | {"word": list(words)}
    shares = Named((maps.tensor.transpose(1, 2) / 0.1).softmax(1), ("block", "word", "image"), coords)
    return unfold_patches(shares, "image", patch_grid(out.latents.shape))
