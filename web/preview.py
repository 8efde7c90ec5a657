"""``python web/preview.py``: fit the page's quick preview of latents and write ``src/page/preview.json``.

The page shows a latent before the decoder has decoded it. Each of a cell's 2 x 2 preview pixels (4 x 4 pixels of the
picture each) is a polynomial of degree 2 in the cell's 16 numbers, fitted by least squares to what the decoder makes of
the predicted x0 of all steps, and of the last steps' latents, for 32 prompts; tested on 8 others.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fluxedu as fe
from evidence.prompts import questions

PROMPTS, BATCH = 40, 8


def features(cells: np.ndarray) -> np.ndarray:
    """[N, 16] -> [N, 1 + 16 + 136]: 1, the numbers, and their products i <= j."""
    i, j = np.triu_indices(16)
    return np.concatenate([np.ones((len(cells), 1)), cells, cells[:, i] * cells[:, j]], axis=1)


@torch.no_grad()
def samples(pipe, batch) -> tuple[np.ndarray, np.ndarray]:
    """Features of cells, and the colours [N, 12] of their 2 x 2 pixels, in [-1, 1]."""
    run = pipe([q.prompt for q in batch], seed=[q.seed for q in batch], steps=20, progress=False).trajectory
    latents = torch.cat([run.latents[17:].flatten(0, 1), run.x0[1:].flatten(0, 1)])
    images = torch.cat([pipe.autoencoder.decode(part) for part in latents.split(16)]).clamp(-1, 1)
    small = F.avg_pool2d(images, 4).reshape(len(latents), 3, 16, 2, 16, 2)
    colours = small.permute(0, 2, 4, 3, 5, 1).reshape(-1, 12).double().numpy()
    return features(latents.permute(0, 2, 3, 1).reshape(-1, 16).double().numpy()), colours


if __name__ == "__main__":
    pipe, asked = fe.load(), questions(PROMPTS)
    *fitted, (x_test, y_test) = (samples(pipe, asked[i : i + BATCH]) for i in range(0, PROMPTS, BATCH))
    gram, target = (sum(x.T @ z for x, z in ((x, (x, y)[k]) for x, y in fitted)) for k in (0, 1))
    count = sum(len(x) for x, _ in fitted)
    weights = np.linalg.solve(gram + 1e-6 * count * np.eye(len(gram)), target)
    error = np.clip(x_test @ weights, -1, 1) - y_test
    print(f"share of the variance explained: {1 - (error**2).sum() / ((y_test - y_test.mean(0)) ** 2).sum():.2f}")
    rows = [[round(float(value), 4) for value in row] for row in weights]
    path = Path(__file__).parent / "src" / "page" / "preview.json"
    path.write_text(json.dumps(rows, separators=(",", ":")) + "\n")
