"""``python web/recorded.py``: record what the page shows until its own first picture is drawn.

One step of the page's first prompt, and the same picture with another colour for T5 ("T5 reads green"). It writes
``src/page/recorded.json`` (what the numbers mean) and, into ``fluxedu/play/static``, ``recorded.gz`` and two pictures.
The page needs only the rows of the patches' attention. A row is stored as its maximum, and per weight one byte, the
square root of the weight's share of this maximum: the error is at most 0.4 % of the maximum.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import fluxedu as fe

PROMPT, GREEN, STEP = "a red circle left of a blue square", "a green circle left of a blue square", 9
WEB = Path(__file__).parent
STATIC = WEB.parent / "fluxedu" / "play" / "static"

if __name__ == "__main__":
    pipe = fe.load()
    with fe.record("*.attn.map", steps=[STEP]) as recorder:
        result = pipe(PROMPT, seed=0, progress=False)
    plain, green = (pipe.prompt_encoder([prompt]) for prompt in (PROMPT, GREEN))
    after = pipe(replace(plain, txt=green.txt), seed=0, progress=False)
    blocks = [name.removesuffix(".attn.map") for name in recorder if name.startswith(("double.", "single."))]
    config, txt_len = pipe.flux.config, pipe.prompt_encoder.t5_tokenizer.length
    maps = np.stack([recorder[f"{block}.attn.map"].tensor.numpy()[0, :, txt_len:] for block in blocks])
    largest = maps.max(-1, keepdims=True)
    run = result.trajectory
    latents = [part[STEP, 0].numpy().astype("<f4") for part in (run.latents, run.x0)]  # [C, h, w]
    levels = np.rint(255 * np.sqrt(maps / largest)).astype(np.uint8)
    parts = [*latents, largest.astype("<f4"), levels]
    packed = gzip.compress(b"".join(part.tobytes() for part in parts), 9, mtime=0)
    (STATIC / "recorded.gz").write_bytes(packed)
    result.images[0].convert("RGB").save(STATIC / "still.png", optimize=True)
    after.images[0].convert("RGB").save(STATIC / "still-green.png", optimize=True)
    about = {
        "request": {"prompt": PROMPT, "seed": 0, "steps": pipe.defaults.steps},
        "change": {"kind": "prompts", "t5": GREEN, "clip": PROMPT},
        "step": STEP,
        "t": round(float(run.times[STEP]), 4),
        "shape": list(run.latents.shape[2:]),
        "tokens": pipe.prompt_encoder.t5_tokenizer.pieces(PROMPT),
        "blocks": blocks,
        "heads": config.num_heads,
        "txtLen": txt_len,
    }
    (WEB / "src" / "page" / "recorded.json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
