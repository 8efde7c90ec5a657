"""Things that somebody may hand over in the place of a file: other kinds of files, forged headers, damaged pictures."""

import io
import json
import os
import pickle
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

DEEP = "[" * 100_000 + "]" * 100_000
NAMES = ["", "a" * 100_000, "\ud800", "\x00", "../../x", "a\nb", "\x1b[2J", "img_in.weight", "é" * 300, "lora_A", " "]
DTYPES = [
    "f32",
    "",
    "F4",
    "F8_E8M0",
    "F6_E2M3",
    "C64",
    "U64",
    "I64",
    "BOOL",
    "BF16",
    "F64",
    None,
    32,
    ["F32"],
    "F" * 9999,
]
SHAPES = [[], [0], [-1, -1], [2**63], [2**40, 2**40], [1] * 2000, ["3"], [1.5], None, "33", [[3]], [True], [1e300], {}]
OFFSETS = [
    [],
    [0],
    [0, 0],
    [4, 0],
    [-8, 8],
    [0, 2**63],
    [2**64, 2**64 + 4],
    ["0", "4"],
    [0.0, 4.0],
    None,
    [1, 5],
    [0, 4, 8],
]


# ---------------------------------------------------------------- in the place of a file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket is at most 108 characters long
        server.bind(path.name)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path.name if target == "itself" else target)


def unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def holding(data: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


class Bomb:
    """Unpickled, it raises the name of a class that no test may see."""

    def __reduce__(self):
        return os.system, ("touch escaped",)


THINGS = {
    "a pipe": pipe,
    "a socket": listening_socket,
    "zeros without end": link("/dev/zero"),
    "random bytes without end": link("/dev/urandom"),
    "a terminal": link("/dev/tty"),
    "nothing": link("/dev/null"),
    "a full device": link("/dev/full"),
    "memory": link("/proc/self/mem"),
    "a kernel's file without a size": link("/proc/self/environ"),
    "a link to itself": link("itself"),
    "a link to nothing": link("nowhere"),
    "a link to its folder": link("."),
    "a folder": Path.mkdir,
    "an unreadable file": unreadable,
    "an empty file": holding(b""),
    "one byte": holding(b"\x00"),
    "eight zeros": holding(bytes(8)),
    "a header without an end": holding((2**63).to_bytes(8, "little") + b"{"),
    "a header of 2 GB": holding((2**31).to_bytes(8, "little") + b"{" + b" " * 1000),
    "an empty header": holding((2).to_bytes(8, "little") + b"{}"),
    "a list as header": holding((2).to_bytes(8, "little") + b"[]"),
    "a deep header": holding(len(DEEP).to_bytes(8, "little") + DEEP.encode()),
    "a deep dictionary": holding('{"a":' * 50_000 + "1" + "}" * 50_000),
    "deep JSON": holding(DEEP),
    "a long number": holding("9" * 100_000),
    "JSON with NaN": holding('{"a": NaN, "b": Infinity, "c": 1e999}'),
    "a JSON string": holding('"x"'),
    "null": holding("null"),
    "half a character": holding('{"a": "\\ud800"}'),
    "Latin-1": holding("é".encode("latin-1") * 20),
    "UTF-16": holding('{"a": 1}'.encode("utf-16")),
    "UTF-8 with a mark": holding("\ufeff{}"),
    "a pickle": holding(pickle.dumps(Bomb())),
    "an old pickle": holding(pickle.dumps({"a": Bomb()}, protocol=0)),
    "a zip": holding(b"PK\x03\x04" + bytes(100)),
    "GGUF": holding(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(100)),
    "GGUF cut short": holding(b"GGUF"),
    "GGUF of an odd type": holding(b"GGUF" + struct.pack("<IQQ", 99, 1, 1) + b"\xff" * 200),
    "a numpy array": holding(b"\x93NUMPY\x01\x00v\x00" + bytes(200)),
    "HDF5": holding(b"\x89HDF\r\n\x1a\n" + bytes(200)),
    "a web page": holding("<!DOCTYPE html><html>404</html>"),
    "a Git LFS pointer": holding("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n"),
    "a gzip": holding(b"\x1f\x8b\x08\x00" + bytes(100)),
    "an ELF": holding(b"\x7fELF" + bytes(100)),
    "a script": holding("#!/bin/sh\ntouch escaped\n"),
    "carriage returns": holding("{}\r\n\r\n"),
}


def put(thing: str, path: Path) -> None:
    """Put one of :data:`THINGS` in the place of a file."""
    if path.is_symlink() or path.exists():
        path.unlink()
    THINGS[thing](path)


# ---------------------------------------------------------------- headers of tensors


def forged(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else about one or two tensors, or about the file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(names)
        entry = header.get(name)
        kind = chance.randrange(9)
        if kind == 0:
            entry["dtype"] = chance.choice(DTYPES)
        elif kind == 1:
            entry["shape"] = chance.choice(SHAPES)
        elif kind == 2:
            entry["data_offsets"] = chance.choice(OFFSETS)
        elif kind == 3:  # two tensors in one place
            entry["data_offsets"] = header[chance.choice(names)]["data_offsets"]
        elif kind == 4 and name in header:
            header[chance.choice(NAMES)] = header.pop(name)
            names = [name for name in header if name != "__metadata__"]
        elif kind == 5:
            header["__metadata__"] = chance.choice(
                [None, [], 3, {"a": 1}, {"fluxedu_config": DEEP}, {"fluxedu_config": '["FluxConfig", {"depth": 1e9}]'},
                 {"fluxedu_config": "x" * 100_000}, {"lora_adapter_metadata": DEEP}, {"ss_network_alpha": "1e999"},
                 {"lora_alpha": "__import__('os')"}, {"ss_network_alpha": "NaN"}, {NAMES[1]: NAMES[1]}]
            )  # fmt: skip
        elif kind == 6:
            entry[chance.choice(("extra", "dtype ", "shape"))] = chance.choice((None, 1, "x", [3]))
        elif kind == 7:
            header[f"{name}.copy"] = entry
        else:
            del entry[chance.choice(sorted(entry))]
            break
        if not all(isinstance(entry, dict) and "data_offsets" in entry for entry in map(header.get, names)):
            break
    text = json.dumps(header).encode()
    if chance.random() < 0.1:
        text = chance.choice((b" " * 100 + text, text + b" " * 999, text + b"\x00", b"\xef\xbb\xbf" + text, text[:-1]))
    tail = data[8 + length :] + (chance.randbytes(7) if chance.random() < 0.1 else b"")
    return len(text).to_bytes(8, "little") + text + tail


# ---------------------------------------------------------------- pictures


def png(width: int, height: int, colour: int = 2, depth: int = 8, data: bytes | None = None, *chunks: bytes) -> bytes:
    """A PNG with this header, whatever its pixels are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(bytes(2000)) if data is None else data
    parts = [
        chunk(b"IHDR", header),
        *(chunk(c[:4], c[4:]) for c in chunks),
        chunk(b"IDAT", pixels),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Pictures that are unusual but in order, and pictures that nobody can read."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
    frames = [noise.rotate(angle) for angle in (90, 180)]
    palette = noise.quantize(8)
    found = {
        "a bomb of zeros": png(60_000, 60_000, 0, 1, zlib.compress(bytes(1 << 22))),
        "a bomb of 4 billion columns": png(2**31 - 1, 1),
        "a bomb of rows": png(1, 2**31 - 1),
        "more pixels than allowed": png(20_000, 20_000, 0, 1),
        "no columns": png(0, 16),
        "no rows": png(16, 0),
        "negative columns": png(2**32 - 1, 16),
        "an unknown colour type": png(16, 16, 9),
        "an unknown depth": png(16, 16, 2, 3),
        "no pixels": png(16, 16, 2, 8, b""),
        "no zlib": png(16, 16, 2, 8, b"xxxxxxxxxxxx"),
        "a palette that is missing": png(16, 16, 3),
        "a text bomb": png(16, 16, 2, 8, None, b"zTXta\0\0" + zlib.compress(bytes(1 << 26))),
        "a profile bomb": png(16, 16, 2, 8, None, b"iCCPa\0\0" + zlib.compress(bytes(1 << 24))),
        "an EXIF of nonsense": png(16, 16, 2, 8, None, b"eXIf" + b"\xff" * 50),
        "an animation of no frames": png(16, 16, 2, 8, None, b"acTL" + struct.pack(">II", 0, 0)),
        "an animation of 4 billion frames": png(16, 16, 2, 8, None, b"acTL" + struct.pack(">II", 2**32 - 1, 0)),
        "an animated GIF": saved(palette, "GIF", save_all=True, append_images=[f.quantize(8) for f in frames]),
        "an animated WebP": saved(noise, "WEBP", save_all=True, append_images=frames),
        "a TIFF of pages": saved(noise, "TIFF", save_all=True, append_images=frames),
        "CMYK": saved(noise.convert("CMYK"), "JPEG"),
        "YCbCr": saved(noise.convert("YCbCr"), "TIFF"),
        "Lab": saved(Image.new("LAB", (16, 16)), "TIFF"),
        "a palette with transparency": saved(palette, "PNG", transparency=bytes([0, 100, 255])),
        "grey with alpha": saved(noise.convert("LA"), "PNG"),
        "one bit": saved(noise.convert("1"), "PNG"),
        "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
        "one row": saved(Image.new("RGB", (3000, 1)), "PNG"),
        "integers": saved(Image.fromarray(rng.integers(-9, 9, (16, 16), np.int32), "I"), "TIFF"),
        "NaN": saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"),
        "an icon": saved(noise, "ICO"),
        "a bitmap": saved(noise, "BMP"),
        "a portable map": saved(noise, "PPM"),
        "a portable map of huge size": b"P6 99999999 99999999 255\n" + bytes(100),
        "a portable map of words": b"P3 x y z\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PDF": b"%PDF-1.7\n" + bytes(50),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\nshowpage\n",
        "a JPEG's first bytes": b"\xff\xd8\xff\xe0",
        "HEIC": b"\x00\x00\x00\x18ftypheic" + bytes(50),
        "PSD": b"8BPS\x00\x01" + bytes(50),
    }
    for kind in ("JPEG", "GIF", "WEBP", "PNG", "TIFF", "BMP"):
        data = saved(palette if kind == "GIF" else noise, kind)
        found |= {f"half a {kind}": data[: len(data) // 2], f"a {kind} without its end": data[:-5]}
    return found
