"""Attention maps, norms and hidden values of the text encoders are those of transformers.

Everything is computed in float64, where the rounding errors of any kernel are far below the bound.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import randomise
from rounding import exact_value

import fluxedu as fe
from fluxedu.models import AutoEncoder, CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from fluxedu.models.config import AutoEncoderConfig

BOUND = 1e-12  # a float64 rounding error is 1e-16; these small networks make it at most a hundred times larger
EAGER = {"attn_implementation": "eager"}


def outputs_of(module, names):
    """A dictionary into which the named submodules write their outputs."""
    outputs = {}
    for name in names:
        save = lambda _, inputs, output, name=name: outputs.update({name: output})  # noqa: E731
        module.get_submodule(name).register_forward_hook(save)
    return outputs


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float64
    assert float((ours - theirs).abs().max()) <= BOUND * max(1.0, float(theirs.abs().max()))


def test_clip():
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "max_position_embeddings": 20, "eos_token_id": 3}
    ours = CLIPTextEncoder(CLIPTextConfig(**sizes))
    randomise(ours, 0).double()
    theirs = transformers.CLIPTextModel._from_config(transformers.CLIPTextConfig(**sizes, bos_token_id=1), **EAGER)
    nested = any(n.startswith("text_model.") for n, _ in theirs.named_parameters())
    state = ours.state_dict() if nested else {n.removeprefix("text_model."): x for n, x in ours.state_dict().items()}
    theirs.double().load_state_dict(state, strict=False)
    ids = torch.randint(4, 50, (2, 11), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 3
    layer = ("text_model." if nested else "") + "encoder.layers.1."
    with torch.no_grad(), fe.record("clip.*") as rec:
        ours(ids)
    names = [layer + name for name in ("layer_norm1", "layer_norm2", "mlp.activation_fn")]
    their_outputs = outputs_of(theirs.eval(), names)
    with torch.no_grad():
        maps = exact_value(lambda: theirs(ids, output_attentions=True).attentions)
    for i, weights in enumerate(maps):
        assert_close(rec[f"clip.text_model.encoder.layers.{i}.self_attn.map"].tensor[0], weights)
    at = "clip.text_model.encoder.layers.1."
    for site, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.hidden", "mlp.activation_fn")):
        assert_close(rec[at + site].tensor[0], their_outputs[layer + name])


def test_t5():
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    ours = T5Encoder(T5Config(**sizes))
    randomise(ours, 0).double()
    more = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    theirs = transformers.T5EncoderModel._from_config(transformers.T5Config(**sizes, **more), **EAGER)
    missing, unexpected = theirs.double().load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all("embed_tokens" in name for name in missing)
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    block = "encoder.block.1.layer."
    names = [block + name for name in ("0.layer_norm", "1.layer_norm", "1.DenseReluDense.dropout")]
    their_outputs = outputs_of(theirs.eval(), names)
    with torch.no_grad(), fe.record("t5.*") as rec:
        ours(ids)
        maps = exact_value(lambda: theirs(ids, output_attentions=True).attentions)
    for i, weights in enumerate(maps):
        assert_close(rec[f"t5.encoder.block.{i}.layer.0.SelfAttention.map"].tensor[0], weights)
    at = "t5.encoder.block.1."
    assert_close(rec[at + "norm1"].tensor[0], their_outputs[block + "0.layer_norm"])
    assert_close(rec[at + "norm2"].tensor[0], their_outputs[block + "1.layer_norm"])
    assert_close(rec[at + "layer.1.DenseReluDense.hidden"].tensor[0], their_outputs[block + "1.DenseReluDense.dropout"])
    with torch.no_grad():
        bias = theirs.encoder.block[0].layer[0].SelfAttention.compute_bias(13, 13)
    assert_close(rec["t5.encoder.block.0.layer.0.SelfAttention.bias"].tensor[0], bias[0])


def test_the_autoencoders_one_attention():
    """Its map times its values, through the output projection, is what the block adds to its input."""
    ae = AutoEncoder(AutoEncoderConfig(ch=8, ch_mult=(1, 1), num_res_blocks=1, norm_groups=4))
    randomise(ae, 0).double()
    with torch.no_grad(), fe.record("ae.decoder.mid.*") as rec:
        ae.decode(torch.randn(1, 16, 3, 4, generator=torch.Generator().manual_seed(1)).double())
    at, cells = "ae.decoder.mid.", lambda name: rec[f"ae.decoder.mid.attn_1.{name}"].tensor[0]
    q, k, v = (cells(name) for name in "qkv")  # [cells, channels]
    assert_close(cells("map")[0], (q @ k.T / q.shape[-1] ** 0.5).softmax(-1))
    added = F.conv2d((cells("map")[0] @ v).T.reshape(1, -1, 3, 4), *ae.decoder.mid.attn_1.proj_out.parameters())
    assert_close(cells("out"), rec[f"{at}block_1.out"].tensor[0] + added[0])


@pytest.mark.parametrize("reduce", ["entropy", "head-mean", "top-2"])
def test_reductions_of_a_map_with_a_bias(reduce):
    """T5's maps have a bias, for which no fused kernel returns a log-sum-exp; reductions are those of the full map."""
    pipe = fe.load(dtype="float64")
    at = "t5.encoder.block.2.layer.0.SelfAttention.map"
    with fe.record(at) as full, fe.record(at, reduce=reduce) as rec, fe.record(at, tokens=["red"]) as word:
        pipe("a red circle", steps=1, progress=False)
    p = full[at].tensor
    want = {"entropy": torch.special.entr(p).sum(-1), "head-mean": p.mean(0)}.get(reduce, p.topk(2, dim=-1).values)
    got = rec[at].tensor[..., 0] if reduce == "top-2" else rec[at].tensor
    assert_close(got, want)
    assert_close(word[at].tensor[..., 0], p[..., 1])
    assert word[at].coords["key"] == ["▁red"]
