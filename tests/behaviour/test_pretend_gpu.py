"""The simulated GPU refuses what a GPU refuses, and no more; where there is a real one, both are tested."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pretend_gpu import pretend_gpu
from torch import nn

import fluxedu as fe

REAL = torch.cuda.is_available()


@pytest.fixture(params=["pretend", pytest.param("real", marks=pytest.mark.gpu)] if REAL else ["pretend"])
def gpu(request):
    """``cuda``, pretended or real."""
    if request.param == "real":
        yield torch.device("cuda")
    else:
        with pretend_gpu():
            yield torch.device("cuda")
        assert torch.cuda.is_available() == REAL


@pytest.fixture
def both(gpu):
    """The same nine numbers here and there."""
    c = torch.arange(9.0).reshape(3, 3)
    return c.to(gpu), c


def assign(x, index, value):
    x[index] = value
    return x


MIXED = {
    "sum": lambda g, c: g + c,
    "a number there, a list here": lambda g, c: g[0, 0] + c[0],
    "product": lambda g, c: g @ c,
    "layer": lambda g, c: F.linear(g, c),
    "loss": lambda g, c: F.cross_entropy(g, c[0].long()),
    "choice": lambda g, c: torch.where(g > 0, g, c),
    "joined": lambda g, c: torch.cat([g, c]),
    "joined numbers": lambda g, c: torch.stack([g[0, 0], c[0, 0]]),
    "table": lambda g, c: F.embedding(c.long() // 3, g),
    "equality": lambda g, c: torch.equal(g, c),
    "in place, here": lambda g, c: c.add_(g[0, 0]),
    "in place, there": lambda g, c: g.mul_(c),
    "picked by indices of the GPU": lambda g, c: c[g[0].long()],
    "put at indices": lambda g, c: assign(g, [0, 2], c[:2]),
    "put under a mask": lambda g, c: assign(g, g > 4, c[c > 4]),
    "a CPU generator": lambda g, c: torch.randn(3, generator=torch.Generator(), device=g.device),
    "a CPU generator in place": lambda g, c: g.normal_(generator=torch.Generator()),
    "a GPU too many": lambda g, c: torch.zeros(1, device="cuda:99"),
    "moved to one too many": lambda g, c: c.to("cuda:99"),
}


@pytest.mark.parametrize("what", MIXED.values(), ids=MIXED)
def test_what_is_refused(both, what):
    with pytest.raises(RuntimeError):
        what(*both)


def test_the_sentence_is_cudas(both):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        both[0] + both[1]


FOR_NUMPY = {
    "numpy": lambda g: g.numpy(),
    "asarray": lambda g: np.asarray(g),
    "asarray of a list": lambda g: np.asarray([g[0, 0], g[0, 1]]),
    "a line": lambda g: Figure().subplots().plot(g[0]),
    "an image": lambda g: Figure().subplots().imshow(g),
    "bars": lambda g: Figure().subplots().bar(range(3), g[0]),
}


@pytest.mark.parametrize("what", FOR_NUMPY.values(), ids=FOR_NUMPY)
def test_numpy_and_matplotlib_need_it_on_the_cpu(both, what):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        what(both[0])
    what(both[0].cpu())


SAME = {  # what is allowed with both gives what it gives on the CPU, and it is on ...
    "product": (lambda g, c: g @ g, "cuda"),
    "a number from here": (lambda g, c: g * c[1, 1], "cuda"),
    "a number from here, first": (lambda g, c: c[1, 1] - g, "cuda"),
    "choice of a number": (lambda g, c: torch.where(g > 4, g, c[0, 1]), "cuda"),
    "indices from here": (lambda g, c: g[c[0].long()], "cuda"),
    "a list": (lambda g, c: g[:, [2, 0]], "cuda"),
    "a mask from here": (lambda g, c: g[c > 4], "cuda"),
    "an index from there": (lambda g, c: c[g[0, 1].long()], "cpu"),
    "copied there": (lambda g, c: g.clone().copy_(c + 1), "cuda"),
    "copied here": (lambda g, c: c.clone().copy_(g + 1), "cpu"),
    "put in a row": (lambda g, c: assign(g, 1, c[0]), "cuda"),
    "a number under a mask": (lambda g, c: assign(g, g > 4, c[0, 1]), "cuda"),
    "a part changed": (lambda g, c: (g.view(-1)[2:4].add_(1), g)[1], "cuda"),
    "like it": (lambda g, c: torch.zeros_like(g), "cuda"),
    "new from it": (lambda g, c: g.new_tensor([1.0]), "cuda"),
    "as it": (lambda g, c: (c + 1).type_as(g), "cuda"),
    "to where it is": (lambda g, c: (c + 1).to(g), "cuda"),
    "of another kind": (lambda g, c: c.to(g.device, torch.float64), "cuda"),
    "by keyword": (lambda g, c: c.to(device=g.device, dtype=torch.int64), "cuda"),
    "back": (lambda g, c: g.cpu(), "cpu"),
    "made there": (lambda g, c: torch.arange(3, device=g.device), "cuda"),
    "made of numbers": (lambda g, c: torch.tensor([1, 2]), "cpu"),
    "made of it": (lambda g, c: torch.as_tensor(g), "cuda"),
    "the largest": (lambda g, c: g.max(dim=0).values, "cuda"),
    "a spectrum": (lambda g, c: torch.fft.fft2(g).abs(), "cuda"),
}  # fmt: skip


@pytest.mark.parametrize("what, device_type", SAME.values(), ids=SAME)
def test_what_is_allowed_gives_the_same(both, what, device_type):
    g, c = both
    want, got = what(c.clone(), c.clone()), what(g, c)
    assert got.device.type == device_type and got.is_cuda == (device_type == "cuda") and got.dtype == want.dtype
    torch.testing.assert_close(got.cpu(), want)


def test_single_numbers_come_back(both):
    g, c = both
    assert float(g.sum()) == g.sum().item() == 36 and f"{g.sum():.1f}" == "36.0" and g.tolist() == c.tolist()
    assert g.to(g.device) is g and g.get_device() == 0
    assert "device='cuda:0'" in repr(g) and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 0


def test_a_network_moves_learns_and_is_copied(gpu):
    """Its parameters stay the same objects, as an optimizer made before expects."""
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2))
    there, x = copy.deepcopy(here), torch.randn(5, 3)
    weights = list(there.parameters())
    steps = [(here, x, torch.optim.AdamW(here.parameters())), (there, x.to(gpu), torch.optim.AdamW(there.parameters()))]
    assert there.to(gpu) is there and all(a is b for a, b in zip(weights, there.parameters(), strict=True))
    for network, given, optimizer in steps:
        network(given).square().sum().backward()
        assert all(p.grad.device == p.device == given.device for p in network.parameters())
        optimizer.step()
    for one in (there, copy.deepcopy(there)):
        assert one[0].weight.is_cuda and isinstance(one[0].weight, nn.Parameter)
        torch.testing.assert_close(one(x.to(gpu)).cpu(), here(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="same device"):
        there(x)
    assert there.cpu()(x).device.type == "cpu" and type(there[0].weight) is nn.Parameter


@torch.no_grad()
def test_the_autoencoder_encodes_and_decodes_there(gpu):
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here, there = fe.load().autoencoder, fe.load(device="cuda").autoencoder
    latents = there.encode(images.to(gpu))
    assert latents.device.type == there.decode(latents).device.type == "cuda"
    assert torch.allclose(latents.cpu(), here.encode(images), atol=1e-3)
    assert torch.allclose(there.decode(latents).cpu(), here.decode(latents.cpu()), atol=1e-3)
