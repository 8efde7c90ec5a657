"""Invalid arguments are refused before anything is computed, in one sentence that says what is allowed."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fluxedu.errors import RequestError, check_device
from fluxedu.sampling.request import checked_dtype

NAN, INF = float("nan"), float("inf")
PICTURE = Image.new("RGB", (32, 32), "teal")
# the arguments, and a pattern that the error message must match; it must also be one sentence
BAD = [
    *[
        ({"steps": x}, "steps must be a whole number from 1 to 1000")
        for x in (0, -1, True, 2.5, "20", [4], NAN, 10**9, 10**400)
    ],
    *[
        ({side: x}, f"{side} must be a whole number from 16 to 4096.*in pixels")
        for side in ("height", "width")
        for x in (0, -5, 15, 10**6, True, 64.0, "a", [64], NAN)
    ],
    *[({"height": x, "image": PICTURE}, "height must be a whole number") for x in (0, False, "")],
    *[
        ({"guidance": x}, "guidance must be a number from 0 to 100.*3.5")
        for x in (NAN, INF, -INF, -1, 101, 10**400, "x", True, [3.5], 1j)
    ],
    *[({"guidance": torch.tensor(x)}, "guidance must be a number from 0 to 100") for x in (3.5, [1.0, 2.0])],
    *[
        ({"true_cfg_scale": x}, "true_cfg_scale must be a number from 0 to 100.*1 is off")
        for x in (NAN, INF, -1, "x", True)
    ],
    *[
        ({"seed": x}, "seed must be a whole number")
        for x in (-1, 1.5, "7", None, True, NAN, 2**63, [], [0, -1], [0, "1"], {0}, [[1]])
    ],
    *[
        ({"prompt": x}, "prompt must be a string or a non-empty list of strings")
        for x in ([], (), [1], None, 3, b"red", ["red", None], {"red"})
    ],
    *[
        (
            {"negative_prompt": x, "true_cfg_scale": 3.0},
            "negative_prompt must be a string or a non-empty list of strings",
        )
        for x in ([], [1], 3, b"red")
    ],
    ({"prompt": "red " * 40}, "prompt must have at most 32 T5 tokens, not .*; make it shorter"),
    ({"prompt": ["red", "red " * 40]}, "prompt must have at most 32 T5 tokens, not .*; make it shorter"),
    ({"negative_prompt": "red " * 40, "true_cfg_scale": 3.0}, "prompt must have at most 32 T5 tokens, not"),
    ({"prompt": ["red", "blue"], "seed": [1, 2, 3]}, "prompt has 2 entries for 3 images; give 1 or 3"),
    ({"prompt": ["red", "blue", "green"], "seed": [1, 2]}, "seed has 2 entries for 3 images; give 1 or 3"),
    ({"negative_prompt": ["a", "b"], "true_cfg_scale": 2.0}, "negative_prompt has 2 entries for 1 images; give 1"),
    ({"negative_prompt": "red"}, "set true_cfg_scale above 1"),
    ({"negative_prompt": "red", "true_cfg_scale": 1}, "set true_cfg_scale above 1"),
    *[
        ({"guidance_interval": x}, "guidance_interval must be two times such as")
        for x in (None, 0.5, (0.2,), (0, 0.5, 1), "ab", {0, 1})
    ],
    *[
        ({"guidance_interval": x}, "guidance_interval must be a number from 0 to 1")
        for x in ((-0.1, 1), (0, 2), (NAN, 1), ("0", 1))
    ],
    ({"guidance_interval": (0.8, 0.2)}, r"must be \(low, high\)"),
    *[({"solver": x}, "solver must be one of euler, midpoint, heun") for x in ("rk4", "Euler", "", None, 1, ["euler"])],
    *[({"rounding": x}, "rounding must be 'up' .* or 'down'") for x in ("near", None, 1, ["up"])],
    *[
        ({"strength": x, "image": PICTURE}, "strength must be a number from 0.001 to 1, ")
        for x in (0, -0.5, 2, NAN, "x", None, True)
    ],
    *[
        ({"image": x}, "an image must be a PIL image, a uint8 array")
        for x in (
            "photo.png",
            3,
            {"a": 1},
            np.zeros((32, 32), np.uint8),
            np.zeros((32, 32, 4), np.uint8),
            np.zeros((1, 32, 32, 3), np.uint8),
            np.zeros((32, 32, 3)),
            np.array(["a"]),
        )
    ],
    *[
        ({name: x}, f"{name}= must be a picture, not .*; FLUX.2 edits several pictures")
        for name in ("image", "mask", "control", "image_prompt")
        for x in ([PICTURE], [[1], [1, 2]], [])
    ],
    *[
        ({"image": torch.zeros(shape)}, r"an image tensor must be \[3, H, W\]")
        for shape in ((32, 32), (4, 32, 32), (1, 1, 3, 32, 32), ())
    ],
    *[
        ({"image": x}, r"numbers in \[-1, 1\]; for bytes")
        for x in (
            torch.zeros(3, 32, 32, dtype=torch.uint8),
            torch.full((3, 32, 32), NAN),
            torch.full((3, 32, 32), 255.0),
        )
    ],
    ({"image": torch.zeros(2, 3, 32, 32), "seed": [1, 2, 3]}, "image has 2 entries for 3 images; give 1 or 3"),
    ({"image": torch.zeros(2, 3, 32, 32)}, "image has 2 entries for 1 images; give 1"),
    ({"image": Image.new("RGB", (8, 8))}, "height must be a whole number from 16"),
    ({"image": torch.zeros(0, 3, 32, 32)}, "image has 0 entries"),
]


def name(case):
    return (
        ", ".join(f"{k}={getattr(v, 'shape', v)!r}"[:40] for k, v in case.items()) if isinstance(case, dict) else None
    )


def one_sentence(error):
    text = str(error.value)
    assert len(text) < 250 and "\n" not in text
    assert text.endswith(".") and not re.search(r"[.!?] [A-Z]", text)
    return True


@pytest.mark.parametrize(("options", "says"), BAD, ids=name)
def test_a_bad_request(options, says, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "velocity_field", None)  # nothing is computed
    with pytest.raises(RequestError, match=says) as error:
        pipe(**{"prompt": "a red circle", "progress": False, **options})
    assert type(error.value) is RequestError and one_sentence(error)


@pytest.mark.parametrize("guidance", [NAN, -1, "x", 10**400])
def test_the_sentence_names_what_was_given(guidance, plain_pipe):
    """Without a guidance input, guidance is another name for true_cfg_scale; the visitor gave the first."""
    with pytest.raises(RequestError, match="^guidance must be a number") as error:
        plain_pipe("red", guidance=guidance)
    assert one_sentence(error)
    with pytest.raises(RequestError, match="^guidance must be a number"):
        plain_pipe("red", guidance=torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ""},
        {"prompt": ["", "a red circle"]},
        {"prompt": ("red", "blue")},
        {"prompt": "!?% zebra \n\t é 🙂"},
        {"prompt": "red", "seed": 2**63 - 1},
        {"prompt": "red", "seed": np.int64(3), "steps": np.int32(2), "guidance": np.float32(2.0)},
        {"prompt": "red", "height": 16, "width": 17},
        {"prompt": "red", "guidance": 0},
        {"prompt": "red", "negative_prompt": "", "true_cfg_scale": 2},
        {"prompt": "red", "image": Image.new("RGBA", (20, 33)), "strength": 0.001},
        {"prompt": "red", "image": Image.new("L", (32, 32))},
        {"prompt": "red", "image": np.zeros((32, 32, 3), np.uint8)},
        {"prompt": "red", "image": torch.ones(3, 32, 32, dtype=torch.float64)},
        {"prompt": "red", "image": torch.ones(2, 3, 32, 32), "seed": [1, 2]},
    ],
    ids=name,
)
def test_a_good_request(options, pipe):
    out = pipe(**{"steps": 1, "progress": False, **options})
    assert torch.isfinite(out.latents).all()


def test_a_wrong_device_or_dtype(pipe):
    """For the loader, and for a pipeline that is moved; it stays where it is."""
    absent = "cuda:99"
    for device in ("gpu", "cuda:x", absent, "", 3.5, None, "meta"):
        with pytest.raises(RequestError, match="cannot be used here; use 'cpu'") as error:
            check_device(device)
        assert one_sentence(error)
    mine = copy.copy(pipe)
    for wrong in ("gpu", absent):
        with pytest.raises(RequestError, match="cannot be used here"):
            mine.to(wrong)
        with pytest.raises(RequestError, match="cannot be used here"):
            mine.to(device=wrong)
    assert pipe.device == check_device("cpu") == torch.device("cpu")

    for dtype in ("float", "int8", 32, ["float32"], torch.int64):
        with pytest.raises(RequestError, match="dtype must be one of float32, float64, bfloat16, float16") as error:
            checked_dtype(dtype)
        assert one_sentence(error)
    assert checked_dtype(None) == checked_dtype("float32") == checked_dtype(torch.float32) == torch.float32
