"""Draws the animation of the README, one image emerging from noise: ``python docs/images/make_film.py``."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import fluxedu as fe
from fluxedu.sampling.images import to_images

PROMPT, SEED = "a red circle left of a blue square on a white background", 0
SIDE, MARGIN = 256, 16
TITLES = ("state x, decoded", "predicted x0, decoded")
INK, GROUND = "#333333", "#ffffff"
STEP_MS, LAST_MS = 220, 2600


@torch.no_grad()
def frames() -> list[Image.Image]:
    pipe = fe.load()
    path = pipe(PROMPT, seed=SEED, progress=False).trajectory
    last = path.latents[-1:]
    states = to_images(pipe.autoencoder.decode(path.latents[:, 0]))
    predictions = to_images(pipe.autoencoder.decode(torch.cat([path.x0, last])[:, 0]))
    pairs = zip(states, predictions, path.times.tolist(), strict=True)
    return [frame(*pair, t, step, len(states) - 1) for step, (*pair, t) in enumerate(pairs)]


def frame(state: Image.Image, predicted: Image.Image, t: float, step: int, steps: int) -> Image.Image:
    """The state and the predicted x0 side by side, below the prompt."""
    canvas = Image.new("RGB", (2 * SIDE + 3 * MARGIN, SIDE + 104), GROUND)
    draw, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((MARGIN, 12), f"“{PROMPT}”", INK, large)
    for i, (image, title) in enumerate(zip((state, predicted), TITLES, strict=True)):
        left = MARGIN + i * (SIDE + MARGIN)
        draw.text((left, 44), title, INK, small)
        canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, 66))
    top = SIDE + 78
    draw.text((MARGIN, top), f"step {step} of {steps}, t = {t:.2f}", INK, small)
    left, right = MARGIN + 180, canvas.width - MARGIN
    draw.rectangle((left, top + 6, right, top + 12), "#dddddd")
    draw.rectangle((left, top + 6, left + (right - left) * step / steps, top + 12), "#0072b2")
    return canvas


if __name__ == "__main__":
    drawn = frames()
    file = Path(__file__).parent / "film.webp"
    times = [STEP_MS] * (len(drawn) - 1) + [LAST_MS]
    drawn[0].save(file, save_all=True, append_images=drawn[1:], duration=times, loop=0, quality=70, method=6)
    print(file, f"{file.stat().st_size / 1e3:.0f} kB")
