"""``python web/preview.py``: fit the page's quick preview of latents and write ``src/page/preview.json``.

The page shows a latent before the decoder has decoded it: a small network gives 2 x 2 pixels per cell (each the mean of
4 x 4 pixels of the picture) from the 16 numbers of the cell, those of its neighbours, and their means over the picture.
It is fitted to what the decoder makes of encoded scenes, and of the predicted x0 of all steps for 32 prompts; it is
tested on the latter for 8 others.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from evidence.prompts import questions
from fluxedu.nano.scenes import render, sample_scene, to_tensor

PROMPTS, BATCH, SCENES, WIDTH, UPDATES = 40, 8, 400, 24, 3000


@torch.no_grad()
def decoded(pipe, latents: Tensor) -> Tensor:
    """[N, 16, 16, 16] -> colours [N, 12, 16, 16] in [-1, 1]: three for each of a cell's 2 x 2 pixels."""
    images = torch.cat([pipe.autoencoder.decode(part) for part in latents.split(16)]).clamp(-1, 1)
    small = F.avg_pool2d(images, 4).reshape(len(latents), 3, 16, 2, 16, 2)
    return small.permute(0, 3, 5, 1, 2, 4).reshape(-1, 12, 16, 16)


@torch.no_grad()
def predictions(pipe, batch) -> Tensor:
    """The predicted x0 of all steps, and the last latents."""
    run = pipe([q.prompt for q in batch], seed=[q.seed for q in batch], steps=20, progress=False).trajectory
    return torch.cat([run.latents[18:].flatten(0, 1), run.x0.flatten(0, 1)])


@torch.no_grad()
def encoded(pipe) -> Tensor:
    rng = np.random.default_rng(5)
    images = to_tensor(np.stack([render(sample_scene(rng, size=(128, 128))) for _ in range(SCENES)]))
    return torch.cat([pipe.autoencoder.encode(part) for part in images.split(16)])


class Preview(nn.Module):
    def __init__(self):
        super().__init__()
        self.near, self.all = nn.Conv2d(16, WIDTH, 3, padding=1), nn.Linear(16, WIDTH, bias=False)
        self.hidden, self.out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.near(x) + self.all(x.mean((2, 3)))[..., None, None])
        return self.out(F.relu(self.hidden(h)))


def numbers(values: Tensor) -> list:
    return np.round(values.detach().double().numpy(), 3).tolist()


if __name__ == "__main__":
    torch.manual_seed(0)
    pipe, prompts = fe.load(), questions(PROMPTS)
    *fitted, test = (predictions(pipe, prompts[i : i + BATCH]) for i in range(0, PROMPTS, BATCH))
    x = torch.cat([*fitted, encoded(pipe)])
    y, y_test, net = decoded(pipe, x), decoded(pipe, test), Preview()
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        chosen = torch.randint(len(x), (12,))
        optimizer.zero_grad()
        F.smooth_l1_loss(net(x[chosen]), y[chosen], beta=0.1).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = net(test).clamp(-1, 1) - y_test
        explained = 1 - error.square().sum() / (y_test - y_test.mean((0, 2, 3), keepdim=True)).square().sum()
    print(f"share of the variance explained: {explained:.3f}")
    layers = {
        "near": numbers(net.near.weight.permute(0, 2, 3, 1).reshape(WIDTH, -1)),  # [WIDTH, 9 * 16]
        "all": numbers(net.all.weight),
        "biases": [numbers(layer.bias) for layer in (net.near, net.hidden, net.out)],
        "hidden": numbers(net.hidden.weight[..., 0, 0]),
        "out": numbers(net.out.weight[..., 0, 0]),
    }
    path = Path(__file__).parent / "src" / "page" / "preview.json"
    path.write_text(json.dumps(layers, separators=(",", ":")) + "\n")
