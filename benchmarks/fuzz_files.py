"""Pictures, films and pages that are odd, broken or hostile, for `fuzz_data.py`: file i of a seed is always the same.

Whole ones have a truth to be held against, the colours of their four quarters as they have to look upright; broken ones
are made of the whole ones; bombs are small files that ask for much.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

SIZE = (64, 48)  # width, height, upright
COLOURS = ((210, 40, 40), (40, 170, 60), (40, 60, 200), (230, 215, 60))  # of the quarters, row by row
GREYS = (40, 110, 180, 240)
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class File:
    """kind: of the table.   media: "image" or "video".   truth: colours of the quarters, None where nobody knows."""

    kind: str
    media: str
    content: bytes
    truth: tuple[tuple[int, int, int], ...] | None = None


def picture(colours=COLOURS, size: tuple[int, int] = SIZE) -> Image.Image:
    (width, height), image = size, Image.new("RGB", size)
    for n, colour in enumerate(colours):
        x, y = n % 2 * (width // 2), n // 2 * (height // 2)
        image.paste(colour, (x, y, x + width // 2, y + height // 2))
    return image


def written(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of zlib-compressed rows, with more chunks before them."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (head, *more, (b"IDAT", rows), (b"IEND", b""))))


def chunk(part: tuple[bytes, bytes]) -> bytes:
    name, data = part
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(count: int) -> bytes:
    """So many zero bytes as zlib packs them: a piece of it as often as needed, and the sum that zeros have."""
    packer, size = zlib.compressobj(9, wbits=-15), 1 << 20
    piece = packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compress(bytes(count % size), 9)[2:-4]
    return b"\x78\xda" + piece * (count // size) + rest + struct.pack(">HH", count % 65521, 1)


# --- whole ones -------------------------------------------------------------------------------------------------------


@functools.cache
def whole() -> dict[str, File]:
    """Name -> a file that any reader should take, or refuse with a reason."""
    rgb, found = picture(), {}

    def add(name: str, content: bytes, truth=COLOURS, media: str = "image") -> None:
        found[name] = File(name, media, content, truth)

    greys = tuple((g, g, g) for g in GREYS)
    grey = picture(greys).convert("L")
    add("jpeg", written(rgb, "JPEG", quality=92))
    add("jpeg progressive", written(rgb, "JPEG", quality=92, progressive=True))
    add("jpeg grey", written(grey, "JPEG", quality=92), greys)
    add("jpeg CMYK", written(rgb.convert("CMYK"), "JPEG", quality=92))
    for turn in range(1, 9):
        exif, stored = Image.Exif(), rgb
        exif[0x0112] = turn
        for move in _UNDO.get(turn, ()):
            stored = stored.transpose(move)
        add(f"jpeg EXIF {turn}", written(stored, "JPEG", quality=92, exif=exif))
        if turn in (3, 6):
            add(f"webp EXIF {turn}", written(stored, "WEBP", quality=95, exif=exif))
            add(f"png EXIF {turn}", written(stored, "PNG", exif=exif))
    add("png", written(rgb, "PNG"))
    add("png grey", written(grey, "PNG"), greys)
    add("png bits", written(picture(((0,) * 3, (255,) * 3) * 2).convert("1"), "PNG"), ((0,) * 3, (255,) * 3) * 2)
    clear = rgb.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    on_white = ((255, 255, 255), *COLOURS[1:])
    add("png alpha", written(clear, "PNG"), on_white)
    add("png grey alpha", written(clear.convert("LA"), "PNG"), None)
    few = picture().quantize(4)
    see_through = few.getpixel((2, 2))
    add("png palette", written(few, "PNG"))
    add("png palette alpha", written(few, "PNG", transparency=see_through), on_white)
    add("png palette alphas", written(few, "PNG", transparency=bytes(0 if n == see_through else 255 for n in range(4))),
        on_white)  # fmt: skip
    deep = (np.asarray(grey, np.uint16) * 257).astype(np.uint16)
    add("png 16-bit", written(Image.fromarray(deep), "PNG"), greys)
    rows = (np.asarray(rgb, np.uint16) * 257).astype(">u2")
    add("png 16-bit RGB", png(*SIZE, 16, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
    moving = [rgb, rgb.transpose(Image.Transpose.FLIP_TOP_BOTTOM), picture(((0, 0, 0),) * 4)]
    add("png animated", written(rgb, "PNG", save_all=True, append_images=moving[1:]))
    add("webp", written(rgb, "WEBP", quality=95))
    add("webp lossless", written(rgb, "WEBP", lossless=True))
    add("webp alpha", written(clear, "WEBP", lossless=True), on_white)
    add("webp animated", written(rgb, "WEBP", save_all=True, append_images=moving[1:], quality=95))
    add("gif", written(few, "GIF"))
    add("gif alpha", written(few, "GIF", transparency=see_through), on_white)
    add("gif animated", written(rgb, "GIF", save_all=True, append_images=moving[1:], duration=100))
    for name, image, truth in (("", rgb, COLOURS), (" CMYK", rgb.convert("CMYK"), COLOURS),
                               (" 16-bit", Image.fromarray(deep), greys), (" float", _float(grey), greys)):  # fmt: skip
        add(f"tiff{name}", written(image, "TIFF"), truth)
    add("tiff deflate", written(rgb, "TIFF", compression="tiff_adobe_deflate"))
    add("tiff pages", written(rgb, "TIFF", save_all=True, append_images=moving[1:], compression="tiff_lzw"))
    add("bmp", written(rgb, "BMP"))
    add("mp4", film(), None, "video")
    add("mkv", film("matroska"), None, "video")
    add("gif as film", found["gif animated"].content, None, "video")
    return found


_T = Image.Transpose
_UNDO = {2: (_T.FLIP_LEFT_RIGHT,), 3: (_T.ROTATE_180,), 4: (_T.FLIP_TOP_BOTTOM,), 5: (_T.TRANSPOSE,),
         6: (_T.ROTATE_90,), 7: (_T.TRANSVERSE,), 8: (_T.ROTATE_270,)}  # fmt: skip


def _float(grey: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(grey, np.float32) / 255)


def film(container: str = "mp4", frames: int = 24, size: tuple[int, int] = SIZE) -> bytes:
    """A film of so many equal frames, 24 a second."""
    import av

    file, image = io.BytesIO(), np.asarray(picture(size=size))
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


# --- broken ones ------------------------------------------------------------------------------------------------------


def truncated(rng: np.random.Generator, content: bytes, _: bytes) -> bytes:
    return content[: int(rng.integers(len(content)))]


def flipped(rng: np.random.Generator, content: bytes, _: bytes) -> bytes:
    data = bytearray(content)
    for at in rng.integers(len(data), size=int(rng.integers(1, 40))):
        data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def spliced(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    return content[: int(rng.integers(len(content)))] + other[int(rng.integers(len(other))) :]


def head_lies(rng: np.random.Generator, content: bytes, _: bytes) -> bytes:
    """Numbers near the front, or anywhere in a film's tables, replaced by extreme ones; sums of a PNG put right."""
    data = bytearray(content)
    near = max(8, len(data) if b"moov" in content else min(len(data), 160))
    for _ in range(int(rng.integers(1, 5))):
        width, order = (1, 2, 4)[int(rng.integers(3))], "<>"[int(rng.integers(2))]
        value = EXTREME[int(rng.integers(len(EXTREME)))] % 256**width
        at = int(rng.integers(4, near))
        data[at : at + width] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[width], value)
    if content.startswith(b"\x89PNG"):
        data[:16] = content[:16]
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data[: len(content)])


def zeroed(rng: np.random.Generator, content: bytes, _: bytes) -> bytes:
    """A hole, as of a download that never came whole."""
    at = int(rng.integers(len(content)))
    return content[:at] + bytes(len(content[at:]) // 2) + content[at + len(content[at:]) // 2 :]


def longer(rng: np.random.Generator, content: bytes, other: bytes) -> bytes:
    return content + other


BROKEN: dict[str, Callable[[np.random.Generator, bytes, bytes], bytes]] = {
    "truncated": truncated, "bit-flipped": flipped, "spliced": spliced, "header lies": head_lies, "zeroed": zeroed,
    "longer": longer,
}  # fmt: skip


# --- hostile ones -----------------------------------------------------------------------------------------------------


def scans(pixels: int, count: int) -> bytes:
    """A progressive JPEG of so many pixels a side whose first scan comes `count` times."""
    content = written(Image.new("L", (pixels, pixels)), "JPEG", progressive=True)
    starts = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    last = content[starts[-1] : -2]
    return content[:-2] + last * count + content[-2:]


def counts_lie(name: bytes, at: int, value: int) -> bytes:
    """A film with a number in one of its tables replaced."""
    content = bytearray(film())
    where = bytes(content).index(name) + at
    content[where : where + 4] = struct.pack(">I", value)
    return bytes(content)


HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "bomb: png of 3.6e9 pixels": ("image", lambda: png(60000, 60000, 8, 2, zlib.compress(bytes(9999)))),
    "bomb: png of 67e6 zeros": ("image", lambda: png(8191, 8191, 8, 2, zeros(8191 * (1 + 3 * 8191)))),
    "bomb: png alpha of 67e6": ("image", lambda: png(8191, 8191, 8, 6, zeros(8191 * (1 + 4 * 8191)))),
    "bomb: png 16-bit of 67e6": ("image", lambda: png(8191, 8191, 16, 0, zeros(8191 * (1 + 2 * 8191)))),
    "bomb: png text of 300 MB": ("image", lambda: png(8, 8, 8, 0, zlib.compress(bytes(72)), (
        b"zTXt", b"Comment\0\0" + zeros(300 << 20)))),
    "bomb: png profile of 300 MB": ("image", lambda: png(8, 8, 8, 0, zlib.compress(bytes(72)), (
        b"iCCP", b"p\0\0" + zeros(300 << 20)))),
    "bomb: png rows of 300 MB": ("image", lambda: png(8, 8, 8, 0, zeros(300 << 20))),
    "bomb: webp of 268e6 pixels": ("image", lambda: _blank_webp()),
    "bomb: gif of 4e9 pixels": ("image", lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff"
                                                 b"\xff\xff\0\x02\x02L\x01\0;"),
    "bomb: tiff of 400e6 pixels": ("image", lambda: _blank_tiff()),
    "bomb: jpeg of 2,000 scans": ("image", lambda: scans(4096, 2000)),
    "bomb: film of 2e9 frames": ("video", lambda: counts_lie(b"stsz", 12, 0x7FFFFFFF)),
    "bomb: film of 2e9 ticks": ("video", lambda: counts_lie(b"stts", 12, 0x7FFFFFFF)),
    "bomb: film of 8191x8191": ("video", lambda: _blank_film()),
    "bomb: zip": ("image", lambda: b"PK\x03\x04" + bytes(26) + zeros(1 << 20)),
    "bomb: pdf": ("image", lambda: _pdf(zeros(100 << 20))),
    "pdf": ("image", lambda: _pdf(zlib.compress(b"0 0 m 9 9 l S"))),
    "svg": ("image", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><!ENTITY a "b"></svg>'),
    "postscript": ("image", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
    "playlist to the network": ("video", lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n"
                                                 b"http://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
    "playlist to a file": ("video", lambda: b"ffconcat version 1.0\nfile a.mp4\n"),
    "session on the network": ("video", lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
                                                b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    "zero-length": ("image", lambda: b""),
    "zero-length film": ("video", lambda: b""),
    "noise": ("image", lambda: np.random.default_rng(0).bytes(5000)),
}  # fmt: skip


def _blank_webp() -> bytes:
    small = bytearray(written(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    at = small.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1
    bits = struct.unpack("<I", small[at : at + 4])[0] & ~0x0FFFFFFF | 16382 | 16382 << 14
    small[at : at + 4] = struct.pack("<I", bits)
    return bytes(small)


def _blank_tiff() -> bytes:
    content = bytearray(written(Image.new("L", (64, 64)), "TIFF", compression="tiff_adobe_deflate"))
    for tag in (256, 257):  # width, height: SHORT or LONG, in a little-endian directory
        at = content.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in content else (
            content.index(struct.pack("<HH", tag, 3)))  # fmt: skip
        content[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 20000)
    return bytes(content)


def _blank_film() -> bytes:
    content = bytearray(film())
    at = bytes(content).index(b"mp4v") + 28  # of the sample entry: width, height
    content[at : at + 4] = struct.pack(">HH", 8191, 8191)
    return bytes(content)


def _pdf(stream: bytes) -> bytes:
    head = f"%PDF-1.7\n1 0 obj\n<</Filter/FlateDecode/Length {len(stream)}>>\nstream\n".encode()
    return head + stream + b"\nendstream\nendobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"


@functools.cache
def hostile(name: str) -> bytes:
    return HOSTILE[name][1]()


HOSTILE_EVERY = 40  # files


def file(seed: int, i: int) -> File:
    """File i: a hostile one now and then (those that take seconds once), each whole one in turn now and then, else a
    broken one."""
    rng, names, hostiles = np.random.default_rng([seed, i]), list(whole()), list(HOSTILE)
    if i % HOSTILE_EVERY == 0:
        turn = i // HOSTILE_EVERY
        again = [name for name in hostiles if "67e6" not in name]
        name = hostiles[turn] if turn < len(hostiles) else again[turn % len(again)]
        return File(name, HOSTILE[name][0], hostile(name))
    if i % 10 == 1:
        return whole()[names[i // 10 % len(names)]]
    one, other = (whole()[names[int(n)]] for n in rng.integers(len(names), size=2))
    how = list(BROKEN)[int(rng.integers(len(BROKEN)))]
    family = one.kind.split()[0] if one.media == "image" else "film"
    return File(f"{family} {how}", one.media, BROKEN[how](rng, one.content, other.content))
