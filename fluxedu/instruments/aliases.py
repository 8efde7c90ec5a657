"""Names of sites in TransformerLens, diffusers and black-forest-labs/flux, for the error that translates them."""

from __future__ import annotations

import re

#: path of a block elsewhere -> here; TransformerLens counts all blocks, the double-stream blocks first
_BLOCKS = {
    "single_transformer_blocks": "single",
    "transformer_blocks": "double",
    "single_blocks": "single",
    "double_blocks": "double",
    "blocks": "single",
}
_PATH = re.compile(rf"(?:.*\.)?({'|'.join(_BLOCKS)})\.(\d+|\*)\.?(.*)")

#: name inside a block, without hook_ -> sites of a double-stream block (of the image), of a single-stream block
_INSIDE = {
    "resid_pre": ("x", "x"),
    "resid_post": ("out", "out"),
    "resid_mid": ("img plus img_attn_contribution", "x plus attn_contribution"),
    "attn_out": ("img_attn_contribution", "attn_contribution"),
    "mlp_out": ("img_mlp_contribution", "mlp_contribution"),
    "result": ("img_head_contribution", "head_contribution"),
    "attn_scores": ("attn.scores", "attn.scores"),
    "pattern": ("attn.map", "attn.map"),
    "z": ("heads", "heads"),
    "q": ("img_attn.q", "q"),
    "k": ("img_attn.k", "k"),
    "rot_q": ("attn.q", "attn.q"),
    "rot_k": ("attn.k", "attn.k"),
    "v": ("img_attn.v", "v"),
    "to_q": ("img_attn.q", "q"),
    "to_k": ("img_attn.k", "k"),
    "to_v": ("img_attn.v", "v"),
    "add_q_proj": ("txt_attn.q", ""),
    "add_k_proj": ("txt_attn.k", ""),
    "add_v_proj": ("txt_attn.v", ""),
    "norm_q": ("img_attn.q_norm", "q_norm"),
    "norm_k": ("img_attn.k_norm", "k_norm"),
    "to_out": ("img_attn_out", ""),
    "to_add_out": ("txt_attn_out", ""),
    "ff": ("img_mlp_out", ""),
    "norm1": ("img_modulated1", ""),
    "norm2": ("img_norm2", ""),
    "norm": ("", "modulated"),
    "proj_mlp": ("", "mlp_hidden"),
    "act_mlp": ("", "mlp_hidden"),
    "proj_out": ("", "added"),
    "attn": ("img_attn_out", "attn_out"),
    "img_attn.qkv": ("img_attn.q, img_attn.k and img_attn.v", ""),
    "img_attn.proj": ("img_attn_out", ""),
    "img_attn.norm": ("img_attn.q_norm and img_attn.k_norm", ""),
    "img_mlp": ("img_mlp_out", ""),
    "img_mod": ("img_mod.*", ""),
    "linear1": ("", "q, k, v and mlp_hidden"),
    "linear2": ("", "added"),
    "modulation": ("", "shift, scale and gate"),
    "": ("out", "out"),
}

#: names outside of blocks
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed": "vec",
    "time_in": "vec.time",
    "vector_in": "vec.text",
    "guidance_in": "vec.guidance",
    "norm_out": "final_layer.modulated",
    "final_layer.linear": "velocity",
    "proj_out": "velocity",
}


def own_name(name: str) -> str | None:
    """The name here of a site that another tool calls ``name``, such as ``transformer_blocks.3.ff``, or None."""
    match = _PATH.fullmatch(name)
    is_bare = "." not in name.removeprefix("*.") and len(name) > 2
    if not (match or is_bare or "hook_" in name):
        return _OUTSIDE.get(name.removeprefix("transformer."))
    kinds, number, inside = ("double", "single"), "*", name
    if match:
        kinds, number, inside = (kinds if match[1] == "blocks" else (_BLOCKS[match[1]],)), match[2], match[3]
    parts = [p for p in inside.replace("hook_", "").split(".") if not p.isdigit() and p not in ("*", "net", "lin")]
    for first in range(max(len(parts), 1)):
        ending = ".".join(parts[first:])
        is_text = ending.startswith("txt_") or ending.endswith("_context")
        ending = re.sub("^txt_", "img_", ending).removesuffix("_context")
        if ending in _INSIDE:
            sites = dict(zip(("double", "single"), _INSIDE[ending], strict=True))
            found = " or ".join(f"{kind}.{number}.{sites[kind]}" for kind in kinds if sites[kind])
            return found.replace("img_", "txt_") if is_text else found
        if not match and ending in _OUTSIDE:
            return _OUTSIDE[ending]
    return None
