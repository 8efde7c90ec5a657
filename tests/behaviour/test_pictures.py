"""Pictures of every mode and dtype: what a viewer shows is what the networks get, or one sentence names the mode."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.errors import RequestError
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import Scene, SceneObject, render
from fluxedu.sampling.images import edges, resized, to_images, to_mask, to_rgb, to_tensor, usual_size

RAMP = np.linspace(0, 1, 24).reshape(4, 6)  # grey levels
WORDS = (RAMP * 65535).round().astype(np.uint16)
RED = (200, 10, 30)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file)


def shown(image):
    """``[H, W, 3]`` from 0 to 1."""
    tensor = to_tensor(image)
    assert tensor.shape[:2] == (1, 3) and tensor.dtype == torch.float32
    return (tensor[0].permute(1, 2, 0).numpy() + 1) / 2


def wide(mode, size):
    """A 16-bit image as Pillow opens it, in each of its modes."""
    if mode == "PNG":
        return saved(Image.fromarray(WORDS))
    if mode == "I":
        return Image.fromarray(WORDS.astype(np.int32))
    raw = {"I;16": "<u2", "I;16B": ">u2"}[mode]
    return Image.frombytes(mode, size, WORDS.astype(raw).tobytes())


@pytest.mark.parametrize("mode", ["PNG", "I", "I;16", "I;16B"])
def test_16_bits_of_grey(mode):
    image = wide(mode, (6, 4))
    assert np.allclose(shown(image), RAMP[..., None], atol=1e-5)
    assert np.array_equal(to_mask(image)[0, 0].numpy(), RAMP >= 0.5)
    assert np.abs(to_rgb(image) / 255 - RAMP[..., None]).max() <= 0.51 / 255


def test_floating_point_grey():
    image = saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF")
    assert image.mode == "F"
    assert np.allclose(shown(image), RAMP[..., None], atol=1e-6)
    assert np.array_equal(to_mask(image)[0, 0].numpy(), RAMP >= 0.5)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.fromarray((RAMP * 255).astype(np.float32)), "mode F must .* from 0 .* to 1 .white., not 0 to 255"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "mode F must .* not nan to nan"),
        (Image.fromarray(np.full((4, 4), -1, np.float32)), "mode F must"),
        (
            Image.fromarray((RAMP * 255).astype(np.int32)),
            "mode I must .* to 65535 .white., some above 255, not 0 to 255",
        ),  # 8 or 16 bits?
        (Image.fromarray((RAMP * 1e6).astype(np.int32)), "mode I must"),
    ],
)
def test_what_has_no_defined_range_is_refused(image, found):
    for function in (to_tensor, to_mask):
        with pytest.raises(RequestError, match=found) as error:
            function(image)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_damaged_file_is_a_sentence():
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(data, "PNG")
    with pytest.raises(RequestError, match="mode RGB cannot be read: "):
        to_tensor(Image.open(io.BytesIO(data.getvalue()[:5000])))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo"
    for length in range(1, len(exif.tobytes())):
        photo = Image.new("RGB", (3, 2))
        photo.info["exif"] = exif.tobytes()[:length]
        try:
            assert to_tensor(photo).shape[1] == 3
        except RequestError as error:
            assert "mode RGB cannot be read: " in str(error)
    with pytest.raises(RequestError, match="a mask must be a PIL image"):
        to_mask(Image.new("L", (0, 3)))


UPRIGHT = np.arange(24, dtype=np.uint8).reshape(4, 6)  # as it is to be seen
#: EXIF orientation -> how the upright picture is stored: the rows and columns of the EXIF standard's table
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = saved(Image.fromarray(np.ascontiguousarray(STORED[orientation])), exif=exif)
    for opened in (image, image.convert("RGB")):  # Pillow keeps the tag of a picture that it converts
        assert np.array_equal((shown(opened)[..., 0] * 255).round(), UPRIGHT)
    assert to_mask(image).shape == (1, 1, 4, 6)


def transparent(mode):
    """The left half is white at alpha 0, the right half is red (or grey, 100) at alpha 255."""
    alpha = np.repeat([[0, 255]], 2, 0).astype(np.uint8)
    right = alpha[..., None] > 0
    color = np.where(right, RED, 255).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([color, alpha]))
    grey = np.where(alpha > 0, 100, 255).astype(np.uint8)
    if mode == "LA":
        return saved(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]))
    if mode == "P":
        image = Image.fromarray((alpha > 0).astype(np.uint8)).copy()
        image.putpalette([255, 255, 255, *RED])
        return saved(image, transparency=0)
    if mode in ("L", "RGB"):  # one colour of a PNG is transparent
        image = Image.fromarray(grey) if mode == "L" else Image.fromarray(color)
        return saved(image, transparency=255 if mode == "L" else (255, 255, 255))
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "P", "L", "RGB"])
def test_transparent_pixels_are_white_in_pictures_and_not_painted_in_masks(mode):
    image = transparent(mode)
    right = [100] * 3 if mode in ("LA", "L") else RED
    assert np.array_equal((shown(image) * 255).round(), np.array([[[255] * 3, right]] * 2))
    assert to_mask(image).sum() == 0  # the white is transparent, the rest is dark


def test_half_transparent_and_black_under_transparency():
    """Black at alpha 128 on white is 127; black at alpha 0, as programs store what was erased, is white."""
    image = Image.fromarray(np.array([[[0, 0, 0, 128], [0, 0, 0, 0]]], np.uint8))
    assert np.array_equal((shown(image)[0, :, 0] * 255).round(), [127, 255])
    white = Image.fromarray(np.array([[[255, 255, 255, 200], [255, 255, 255, 50]]], np.uint8))
    assert to_mask(white).flatten().tolist() == [1, 0]
    sixteen = saved(Image.fromarray(WORDS), transparency=int(WORDS[0, 0]))
    assert shown(sixteen)[0, 0, 0] == 1 and to_mask(sixteen)[0, 0, 0, 0] == 0


def test_other_modes():
    cmyk = Image.new("CMYK", (2, 1))
    cmyk.putdata([(0, 255, 255, 0), (0, 0, 0, 255)])
    assert np.array_equal(shown(cmyk)[0], [[1, 0, 0], [0, 0, 0]])
    bits = Image.new("1", (2, 1))
    bits.putdata([1, 0])
    assert shown(bits)[0, :, 0].tolist() == to_mask(bits).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, np.float64, bool, ">u2"])
def test_arrays_of_another_dtype_are_refused_by_name(dtype):
    with pytest.raises(RequestError, match=rf"not an array \[4, 4, 3\] of {np.dtype(dtype)}\."):
        to_tensor(np.zeros((4, 4, 3), dtype))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "torch.uint8, 0 to 0"),
        (torch.full((3, 4, 4), 7, dtype=torch.uint16), "torch.uint16, 7 to 7"),
        (torch.full((3, 4, 4), torch.nan), "torch.float32, nan to nan"),
        (torch.full((3, 4, 4), 1.5, dtype=torch.float16), "torch.float16, 1.5 to 1.5"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "torch.complex64, complex ones"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), "torch.bool, 0 to 0"),
    ],
)
def test_tensors_out_of_range_are_refused_by_dtype(values, found):
    with pytest.raises(RequestError, match=rf"in \[-1, 1\]; .* this one is {found}\."):
        to_tensor(values)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_masks_of_each_dtype(kind):
    paint = RAMP >= 0.5
    for white, dtype in ((255, np.uint8), (65535, np.uint16), (1, np.float32), (1, np.float16), (1, np.float64)):
        levels = RAMP * white
        assert np.array_equal(to_mask(kind(levels.astype(dtype)))[0, 0].numpy(), levels.astype(dtype) >= white / 2)
    for dtype in (bool, np.uint8, np.uint16, np.int32, np.int64):
        assert np.array_equal(to_mask(kind(paint.astype(dtype)))[0, 0].numpy(), paint)
    for wrong, found in ((RAMP * 255, "float64, 0 to 255"), (RAMP * np.nan, "nan"), (WORDS.astype(int), "int64")):
        with pytest.raises(RequestError, match=f"from 0 .keep. to 1 .paint.; this one is .*{found}"):
            to_mask(kind(wrong))


def test_every_8_bit_level_survives():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(to_rgb(levels), levels) and np.array_equal(to_images(to_tensor(levels))[0], levels)
    assert np.array_equal(to_rgb(Image.fromarray(levels)), levels)


SCENE = Scene("white", (SceneObject("circle", "red", "large", 64, 64, 30),), 128, 128, 0)


def test_the_judge_and_the_edges_see_a_picture_upright_and_on_white():
    drawn = render(SCENE)
    alpha = np.where((drawn > 200).all(-1), 0, 255).astype(np.uint8)
    erased = Image.fromarray(np.dstack([np.where(alpha[..., None] > 0, drawn, 0).astype(np.uint8), alpha]))
    found = detect(erased)
    assert found.background == "white" and [(o.color, o.form) for o in found.objects] == [("red", "circle")]
    pytest.importorskip("cv2")
    sixteen = Image.fromarray(drawn[..., 1].astype(np.uint16) * 257)
    assert np.array_equal(edges(sixteen), edges(Image.fromarray(drawn[..., 1])))


def test_the_command_line_reads_the_same_pictures(tmp_path):
    """A 16-bit depth map draws what the same map in 8 bits draws."""
    depth = render(SCENE)[..., 1]
    Image.fromarray(depth).save(tmp_path / "8.png")
    Image.fromarray(depth.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8", "16"):
        command = ["sample", "a red circle", "--model", "nano-depth", "--steps", "1", "--control"]
        result = CliRunner().invoke(
            app, [*command, str(tmp_path / f"{name}.png"), "-o", str(tmp_path / f"o{name}.png")]
        )
        assert result.exit_code == 0, result.output
    first, second = (np.asarray(Image.open(tmp_path / f"o{name}.png")).astype(int) for name in ("8", "16"))
    assert np.abs(first - second).max() <= 1


# ---------------------------------------------------------------- photos

PHOTO = Image.fromarray(render(SCENE)).resize((400, 300))


def run(pipe, **options):
    """The output of one step, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = pipe("a red circle", steps=1, progress=False, **options)
    return out, [str(warning.message) for warning in caught if "pixels" in str(warning.message)]


def test_a_photo_is_scaled_down_to_the_trained_area_and_one_warning_has_the_sizes(pipe):
    patch = 2 * pipe.autoencoder.config.downscale
    out, found = run(pipe, image=PHOTO)
    width, height = out.images[0].size
    assert abs(width * height / pipe.size**2 - 1) < patch / 32 + 0.1
    assert abs(height - width * 3 / 4) <= patch and width % patch == height % patch == 0
    start = f"image= has 300 x 400 pixels and is scaled down to {height} x {width}"
    assert found == [f"{start}; pass height= and width= for another size."]
    out, found = run(pipe, image=PHOTO, height=48, width=64)
    assert out.images[0].size == (64, 48) and not found
    out, found = run(pipe, image=PHOTO.resize((48, 32)))  # up to twice the trained area, a picture keeps its size
    assert out.images[0].size == (48, 32) and not found
    assert run(pipe, image=PHOTO.resize((5000, 40)))[1]
    noise = run(pipe, decode=False)[0].latents
    assert not run(pipe, image=PHOTO, latents=noise)[1]


@pytest.mark.parametrize("size", [(3000, 4000), (4000, 3000), (5000, 1000), (1449, 1449), (8000, 6000)])
def test_for_flux_the_area_is_one_megapixel_as_for_bfl(size):
    height, width = usual_size(*size, 1024, 16)
    assert height % 16 == width % 16 == 0
    assert 0.96 < height * width / 1024**2 < 1.04
    assert abs(height / width / (size[0] / size[1]) - 1) < 0.03
    for small in ((1080, 1920), (1024, 1024), (640, 480), (17, 33)):
        assert usual_size(*small, 1024, 16) == small


def test_a_reference_has_as_many_tokens_as_an_image():
    kontext = fe.load("nano-kontext")
    for size in ({}, {"height": 64, "width": 64}):
        with fe.record("single.0.x") as rec:
            out, found = run(kontext, reference=PHOTO, **size)
        own = np.prod(out.images[0].size) // 16**2
        tokens = rec["single.0.x"].shape[-2] - kontext.prompt_encoder.t5_tokenizer.length - own
        assert tokens == (112 // 16) * (144 // 16)
        assert found == ["reference= has 300 x 400 pixels and is scaled down to 112 x 144."]
        assert out.images[0].size == ((64, 64) if size else (144, 112))


def test_the_picture_of_a_photo_is_what_pillow_makes_of_it(pipe):
    """Averaged over, as in Pillow's bicubic filter: stripes of one pixel become grey."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for picture in (Image.fromarray(stripes), PHOTO.resize((512, 512))):
        small = picture.resize((64, 64), Image.BICUBIC)
        found = resized(to_tensor(picture), (8, 8), 8)
        assert (found - to_tensor(small)).abs().max() < 1.5 / 127.5
    assert resized(to_tensor(stripes).bfloat16(), (8, 8), 8).abs().max() < 0.1


def test_an_inverted_photo_is_scaled_down(pipe):
    with pytest.warns(RuntimeWarning, match="image= has 300 x 400 pixels and is scaled down to"):
        noise = fe.invert(pipe, PHOTO, "a red circle", steps=1, rounds=1, progress=False)
    assert noise[0, 0].numel() <= 1.3 * (pipe.size // pipe.autoencoder.config.downscale) ** 2
