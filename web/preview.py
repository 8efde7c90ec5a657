"""``python web/preview.py``: fit the page's quick preview of latents and write ``src/page/preview.json``.

The page shows a latent before the decoder has decoded it: a small network, applied to each cell's 16 numbers alone,
gives 2 x 2 pixels (each the mean of 4 x 4 pixels of the picture). It is fitted to what the decoder makes of the
predicted x0 of all steps, and of the last steps' latents, for 32 prompts, and tested on 8 others.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fluxedu as fe
from evidence.prompts import questions

PROMPTS, BATCH, WIDTH, UPDATES = 40, 8, 32, 4000


@torch.no_grad()
def samples(pipe, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells [N, 16], and the colours [N, 12] of their 2 x 2 pixels, in [-1, 1]."""
    run = pipe([q.prompt for q in batch], seed=[q.seed for q in batch], steps=20, progress=False).trajectory
    latents = torch.cat([run.latents[17:].flatten(0, 1), run.x0.flatten(0, 1)])
    images = torch.cat([pipe.autoencoder.decode(part) for part in latents.split(16)]).clamp(-1, 1)
    small = F.avg_pool2d(images, 4).reshape(len(latents), 3, 16, 2, 16, 2)
    return latents.permute(0, 2, 3, 1).reshape(-1, 16), small.permute(0, 2, 4, 3, 5, 1).reshape(-1, 12)


if __name__ == "__main__":
    torch.manual_seed(0)
    pipe, asked = fe.load(), questions(PROMPTS)
    *fitted, (x_test, y_test) = (samples(pipe, asked[i : i + BATCH]) for i in range(0, PROMPTS, BATCH))
    x, y = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    net = nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 12))
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        chosen = torch.randint(len(x), (2048,))
        optimizer.zero_grad()
        F.smooth_l1_loss(net(x[chosen]), y[chosen], beta=0.1).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = net(x_test).clamp(-1, 1) - y_test
        explained = 1 - error.square().sum() / (y_test - y_test.mean(0)).square().sum()
    print(f"share of the variance explained: {explained:.3f}")
    layers = [
        {"weight": [[round(v, 3) for v in row] for row in layer.weight.tolist()],
         "bias": [round(v, 3) for v in layer.bias.tolist()]}
        for layer in net
        if isinstance(layer, nn.Linear)
    ]  # fmt: skip
    path = Path(__file__).parent / "src" / "page" / "preview.json"
    path.write_text(json.dumps(layers, separators=(",", ":")) + "\n")
