"""Maps, norms and hidden values of the text encoders, and the autoencoder's attention, are what others compute."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import randomise

import fluxedu as fe
from fluxedu.models import AutoEncoder, CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from fluxedu.models.config import AutoEncoderConfig

BAR = 1e-6  # in float64: transformers takes its softmax in float32 all the same
EAGER = {"attn_implementation": "eager"}


def caught(module, names):
    """What the named modules of another implementation give, by name."""
    seen, hooks = {}, []
    for name in names:
        take = lambda _, given, out, name=name: seen.update({name: out})  # noqa: E731
        hooks.append(module.get_submodule(name).register_forward_hook(take))
    return seen


def close(mine, theirs):
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) <= BAR * max(1.0, float(theirs.abs().max()))


def test_clip():
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "max_position_embeddings": 20, "eos_token_id": 3}
    mine = CLIPTextEncoder(CLIPTextConfig(**sizes))
    randomise(mine, 0).double()
    theirs = transformers.CLIPTextModel._from_config(transformers.CLIPTextConfig(**sizes, bos_token_id=1), **EAGER)
    names = {n for n, _ in theirs.named_parameters()}
    nested = any(n.startswith("text_model.") for n in names)
    state = mine.state_dict() if nested else {n.removeprefix("text_model."): x for n, x in mine.state_dict().items()}
    theirs.double().load_state_dict(state, strict=False)
    ids = torch.randint(4, 50, (2, 11), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 3
    layer = ("text_model." if nested else "") + "encoder.layers.1."
    with torch.no_grad(), fe.record("clip.*") as rec:
        mine(ids)
    seen = caught(theirs.eval(), [layer + "layer_norm1", layer + "layer_norm2", layer + "mlp.activation_fn"])
    with torch.no_grad():
        maps = theirs(ids, output_attentions=True).attentions
    for i, weights in enumerate(maps):
        close(rec[f"clip.text_model.encoder.layers.{i}.self_attn.map"].tensor[0], weights)
    at = "clip.text_model.encoder.layers.1."
    for site, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.hidden", "mlp.activation_fn")):
        close(rec[at + site].tensor[0], seen[layer + name])


def test_t5():
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    mine = T5Encoder(T5Config(**sizes))
    randomise(mine, 0).double()
    more = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    theirs = transformers.T5EncoderModel._from_config(transformers.T5Config(**sizes, **more), **EAGER)
    missing, unexpected = theirs.double().load_state_dict(mine.state_dict(), strict=False)
    assert not unexpected and all("embed_tokens" in name for name in missing)
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    block = "encoder.block.1.layer."
    seen = caught(theirs.eval(), [block + "0.layer_norm", block + "1.layer_norm", block + "1.DenseReluDense.dropout"])
    with torch.no_grad(), fe.record("t5.*") as rec:
        mine(ids)
        maps = theirs(ids, output_attentions=True).attentions
    for i, weights in enumerate(maps):
        close(rec[f"t5.encoder.block.{i}.layer.0.SelfAttention.map"].tensor[0], weights)
    at = "t5.encoder.block.1."
    close(rec[at + "norm1"].tensor[0], seen[block + "0.layer_norm"])
    close(rec[at + "norm2"].tensor[0], seen[block + "1.layer_norm"])
    close(rec[at + "layer.1.DenseReluDense.hidden"].tensor[0], seen[block + "1.DenseReluDense.dropout"])
    with torch.no_grad():
        bias = theirs.encoder.block[0].layer[0].SelfAttention.compute_bias(13, 13)
    close(rec["t5.encoder.block.0.layer.0.SelfAttention.bias"].tensor[0], bias[0])


def test_the_autoencoders_one_attention():
    """Its map times its values, brought out again, is what the block adds."""
    ae = AutoEncoder(AutoEncoderConfig(ch=8, ch_mult=(1, 1), num_res_blocks=1, norm_groups=4))
    randomise(ae, 0)
    with torch.no_grad(), fe.record("ae.decoder.mid.*") as rec:
        ae.decode(torch.randn(1, 16, 3, 4, generator=torch.Generator().manual_seed(1)))
    at, cells = "ae.decoder.mid.", lambda name: rec[f"ae.decoder.mid.attn_1.{name}"].tensor[0]
    q, k, v = (cells(name) for name in "qkv")  # [cells, channels]
    close(cells("map")[0], (q @ k.T / q.shape[-1] ** 0.5).softmax(-1))
    added = F.conv2d((cells("map")[0] @ v).T.reshape(1, -1, 3, 4), *ae.decoder.mid.attn_1.proj_out.parameters())
    close(cells("out"), rec[f"{at}block_1.out"].tensor[0] + added[0])


@pytest.mark.parametrize("reduce", ["entropy", "head-mean", "top-2"])
def test_reductions_of_a_map_with_a_bias(reduce):
    """T5's maps have a bias, which no kernel tells a log-sum-exp of: reduced where they are as from the whole."""
    pipe = fe.load(dtype="float64")
    at = "t5.encoder.block.2.layer.0.SelfAttention.map"
    with fe.record(at) as whole, fe.record(at, reduce=reduce) as rec, fe.record(at, tokens=["red"]) as word:
        pipe("a red circle", steps=1, progress=False)
    p = whole[at].tensor
    want = {"entropy": torch.special.entr(p).sum(-1), "head-mean": p.mean(0)}.get(reduce, p.topk(2, dim=-1).values)
    got = rec[at].tensor[..., 0] if reduce == "top-2" else rec[at].tensor
    close(got, want)
    close(word[at].tensor[..., 0], p[..., 1])
    assert word[at].coords["key"] == ["▁red"]
