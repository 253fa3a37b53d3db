"""Image files of every kind, read as a person sees them, and files that are none."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from recast_exp import RecastModel
from recast_exp.config.schema import DatasetConfig
from recast_exp.data import read_official
from recast_exp.data.images import UnreadableImageError, damaged_files, read_image, size_of
from recast_exp.data.listing import images_at
from recast_exp.data.preprocessing import Decoding, Geometry, InputSpec
from recast_exp.data.protocol import choose
from recast_exp.data.store import Request, open_stores
from recast_exp.data.transforms import augmentation
from recast_exp.data.types import Samples
from recast_exp.errors import UserError
from support.fixtures_data import make_folder

NOW, BEFORE = Decoding("white", orient=True), Decoding()

# A grey ramp, whose four corners differ
RAMP = np.add.outer(np.arange(40), 3 * np.arange(30)).astype(np.uint8)
TURNED = {  # numpy's own words for what EXIF's values say
    1: lambda shown: shown,
    2: np.fliplr,
    3: lambda shown: np.rot90(shown, 2),
    4: np.flipud,
    5: lambda shown: shown.T,
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: np.rot90(shown, 2).T,
    8: lambda shown: np.rot90(shown, -1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_photographs_are_turned(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](RAMP))).convert("RGB")
    stored.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    pixels = read_image(path, NOW)
    assert size_of(path, NOW) == pixels.shape[1:] == RAMP.shape
    assert torch.equal(pixels[0], torch.from_numpy(RAMP))
    assert size_of(path, BEFORE) == read_image(path, BEFORE).shape[1:]


@pytest.mark.parametrize("decoding", [NOW, BEFORE])
def test_a_tiff_that_is_turned_by_its_xmp_data(tmp_path: Path, decoding: Decoding) -> None:
    path, info = tmp_path / "photo.tif", TiffImagePlugin.ImageFileDirectory_v2()
    info[700] = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info.tagtype[700] = 1
    Image.fromarray(np.ascontiguousarray(RAMP)).save(path, tiffinfo=info)
    assert size_of(path, decoding) == read_image(path, decoding).shape[1:]


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00"]
)
def test_damaged_exif_data_leaves_the_image_as_it_is(tmp_path: Path, exif: bytes) -> None:
    for name in ("a.png", "a.jpg"):
        Image.fromarray(RAMP).save(tmp_path / name, exif=b"Exif\x00\x00" + exif)
    assert torch.equal(read_image(tmp_path / "a.png", NOW)[0], torch.from_numpy(RAMP))
    for name in ("a.png", "a.jpg"):
        assert size_of(tmp_path / name, NOW) == read_image(tmp_path / name, NOW).shape[1:] == RAMP.shape


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
def test_a_drawing_on_transparency_stands_on_the_background(tmp_path: Path, mode: str) -> None:
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:15, 5:15] = 255
    path = tmp_path / "drawing.png"
    if mode in ("P", "L"):  # black is drawn with the value 1; the value 0 is transparent
        drawing = Image.fromarray((alpha > 0).astype(np.uint8), mode="L" if mode == "L" else "P")
        if mode == "P":
            drawing.putpalette([0, 0, 0, 0, 0, 0])
        drawing.save(path, transparency=0)
    else:
        drawing = Image.new("RGBA", (20, 20))
        drawing.putalpha(Image.fromarray(alpha))
        drawing.convert(mode).save(path if mode != "PA" else path.with_suffix(".tif"))
        path = path if mode != "PA" else path.with_suffix(".tif")
    expected = torch.from_numpy(np.where(alpha, 0, 255).astype(np.uint8))
    assert (read_image(path, NOW)[0].int() - expected.int()).abs().max() <= 1
    assert read_image(path, Decoding("#ff0000"))[:, 0, 0].tolist() == [255, 0, 0]
    assert read_image(path, BEFORE).max() <= 1  # all black, as before


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 100, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", NOW)[:, 0, 0].tolist() == [227, 127, 177]


def write_grey_tiff(path: Path, content: bytes, order: str = "<", bits: int = 16, photometric: int = 1) -> None:
    """Write a TIFF of the shape of `RAMP` as other programs do; 0 is white for `photometric=0`."""
    height, width = RAMP.shape
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, height), (279, 4, 1, len(content))]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(f"{order}HHIH2x" if kind == 3 else f"{order}HHII", tag, kind, count, value)
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(content))
    path.write_bytes(header + content + directory + bytes(4))


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_in_either_order_of_bytes(tmp_path: Path, order: str) -> None:
    write_grey_tiff(tmp_path / "deep.tif", (RAMP.astype(np.uint16) * 257).astype(f"{order}u2").tobytes(), order)
    assert torch.equal(read_image(tmp_path / "deep.tif")[0], torch.from_numpy(RAMP))


def test_a_tiff_of_sixteen_bits_whose_zero_is_white(tmp_path: Path) -> None:
    write_grey_tiff(tmp_path / "film.tif", (RAMP.astype("<u2") * 257).tobytes(), photometric=0)
    assert torch.equal(read_image(tmp_path / "film.tif")[0], torch.from_numpy(255 - RAMP))


def test_a_tiff_of_twelve_bits(tmp_path: Path) -> None:
    """As cameras of microscopes and X-rays write it: two values in three bytes."""
    left, right = (RAMP.astype(np.uint16).reshape(-1, 2) * 16).T
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], 1).astype(np.uint8)
    write_grey_tiff(tmp_path / "camera.tif", packed.tobytes(), bits=12)
    assert torch.equal(read_image(tmp_path / "camera.tif")[0], torch.from_numpy(RAMP))


def test_a_png_with_much_text(tmp_path: Path) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.fromarray(RAMP).save(tmp_path / "text.png", pnginfo=facts)
    assert torch.equal(read_image(tmp_path / "text.png")[0], torch.from_numpy(RAMP))


def test_the_limit_on_pixels(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=r"1,200 pixels, more than .* 1,199\); raise dataset\.max_pixels"):
        read_image(tmp_path / "a.png", Decoding(max_pixels=1199))
    assert read_image(tmp_path / "a.png", Decoding(max_pixels=1200)).shape == (3, 40, 30)


def test_an_image_beyond_the_limit_of_pil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=r"raise dataset\.max_pixels"):
        read_image(tmp_path / "a.png", Decoding(max_pixels=1000))
    assert read_image(tmp_path / "a.png", Decoding(max_pixels=1200)).shape == (3, 40, 30)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (3, 5000)])
@pytest.mark.parametrize("name", ["none", "standard", "light", "shift", "authors"])
def test_extreme_shapes_take_little_memory(shape: tuple[int, int], name: str) -> None:
    spec = InputSpec(224, (0.5,), (0.5,), 0.9, "bicubic", background="white", orient=True)
    augment = augmentation(name, spec)
    resized = augment.geometry(torch.zeros(3, *shape, dtype=torch.uint8))
    assert resized.shape[1:] == augment.geometry.shape(*shape)
    assert resized.numel() < 4_000_000
    assert augment.crop(resized, [0.5] * augment.draws).shape == (3, 224, 224)


def test_images_of_usual_shapes_are_resized_whole() -> None:
    pixels = torch.arange(3 * 20 * 300, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 20, 300)
    assert Geometry(10, False, "bilinear")(pixels).shape == (3, 10, 150)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>Please log in", "a web page"),
        (b"<HTML>404", "a web page"),
    ],
)
def test_what_is_found_in_the_place_of_an_image(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=what) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    assert what in damaged_files([path], NOW)[path]


def test_stores_of_another_decoding_are_others(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    samples = Samples((tmp_path / "a.png",), np.zeros(1, np.int64))

    def value(background: str, max_pixels: int = 1000) -> int:
        geometry = Geometry(8, False, "bilinear", Decoding(background, max_pixels=max_pixels))
        store = open_stores({"train": Request(samples, geometry)}, "memmap", tmp_path / "cache", "x")["train"]
        return int(store[0][0, 0, 0])

    assert (value("white"), value("black"), value("white", 2000)) == (255, 0, 255)
    assert len(list((tmp_path / "cache" / "images").glob("*/pixels.bin"))) == 2


# Folders


def test_folders_that_systems_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path)
    classes = read_official(DatasetConfig(name="folder", path=str(tmp_path)), tmp_path)
    caplog.set_level("INFO")
    inside = sorted(tmp_path.iterdir())[0]
    for place in (tmp_path, inside):
        for name in ("@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN"):
            (place / name / "0.png").mkdir(parents=True)
            Image.fromarray(RAMP).save(place / name / "0.png" / "SYNOPHOTO_THUMB.png")
    (inside / "Thumbs.db").write_bytes(b"x")
    (inside / "notes.heic").write_bytes(b"x")
    found = read_official(DatasetConfig(name="folder", path=str(tmp_path)), tmp_path)
    assert found.classes == classes.classes
    assert found.splits["all"].images == classes.splits["all"].images
    assert found.unread == {"@eaDir/": 1, "__MACOSX/": 1, "$RECYCLE.BIN/": 1, ".db": 1, ".heic": 1}
    assert "3 folder(s) that systems leave are skipped" in caplog.text
    assert set(images_at(str(tmp_path))) == set(found.splits["all"].images)
    assert set(images_at(str(tmp_path / "**" / "*.png"))) == set(found.splits["all"].images)


def test_a_limit_that_leaves_images_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    folder = sorted(tmp_path.iterdir())[0]
    Image.new("L", (400, 400)).save(folder / "large.png")
    cfg = DatasetConfig(name="folder", path=str(tmp_path), bad_images="skip", max_pixels=100_000)
    assert list(choose(cfg, read_official(cfg, tmp_path)).skipped) == [str(folder / "large.png")]


# Tasks


def test_the_library_sees_what_a_person_sees(tmp_path: Path) -> None:
    model = RecastModel.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=64)
    model.add_task("pets", ["cat", "dog"])
    upright = Image.fromarray(np.kron(RAMP, np.ones((3, 3), np.uint8))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    first, second = model.predict([tmp_path / "upright.png", tmp_path / "turned.png"], tasks="pets")
    assert first.top == second.top


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"  # which PIL runs for an EPS file, whatever its name says
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadableImageError, match="cannot identify image file"):
        read_image(path)
    assert not started.exists()


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0), ("drop", 32)])
def test_a_transparent_value_of_16_bits_shows_the_background(background: str, level: int, tmp_path: Path) -> None:
    grey = np.full((4, 4), 0x2010, np.uint16)
    grey[0] = 0x2011  # the next value is no longer transparent
    Image.fromarray(grey).save(tmp_path / "g.png", transparency=0x2010)
    pixels = read_image(tmp_path / "g.png", Decoding(background))
    assert (pixels[:, 0] == 32).all()
    assert (pixels[:, 1:] == level).all()


@pytest.mark.parametrize(
    ("bits", "kind", "clear", "row", "level"),
    [
        (1, 0, [1], b"\x80", 0),  # pixels 1, 0, 0, 0: the first is clear
        (1, 0, [0], b"\x70", 255),
        (2, 0, [2], bytes([0b10_01_01_01]), 85),
        (4, 0, [3], b"\x35\x55", 85),
        (16, 2, [0x2010, 0x3010, 0x4010], bytes([0x20, 0x10, 0x30, 0x10, 0x40, 0x10, *[0x55] * 18]), 85),
    ],
)
def test_the_transparent_colour_of_a_png_counts_in_its_own_bits(
    bits: int, kind: int, clear: list[int], row: bytes, level: int, tmp_path: Path
) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, kind, 0, 0, 0))
    colour = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    content = header + colour + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "clear.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    pixels = read_image(tmp_path / "clear.png", Decoding("#ff0000"))
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert (pixels[:, 0, 1:] == level).all()


def test_grey_of_16_bits_in_every_format(tmp_path: Path) -> None:
    grey = (RAMP.astype(np.uint16) * 300).astype(">u2")
    (tmp_path / "g.pgm").write_bytes(b"P5 %d %d 65535\n" % grey.shape[::-1] + grey.tobytes())
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "g.png")
    expected = torch.from_numpy((grey >> 8).astype(np.uint8))
    for name in ("g.pgm", "g.png"):
        assert torch.equal(read_image(tmp_path / name)[0], expected)


def test_folders_called_training_and_testing_are_splits(tmp_path: Path) -> None:
    for split in ("training", "testing", "extra"):
        make_folder(tmp_path / split)
    official = read_official(DatasetConfig(name="folder", path=str(tmp_path)), "nowhere")
    assert sorted(official.splits) == ["test", "train"]
    assert official.unread == {"extra/": 1}


@pytest.mark.parametrize(("key", "value"), [("val_fraction", 0.5), ("split", "redrawn")])
def test_a_folder_without_splits_is_divided_one_way(tmp_path: Path, key: str, value: object) -> None:
    make_folder(tmp_path)
    cfg = DatasetConfig(name="folder", path=str(tmp_path), **{key: value})
    with pytest.raises(UserError, match=rf"^dataset\.{key}: expected .* divided 60 %, 20 %, 20 % for training"):
        choose(cfg, read_official(cfg, "nowhere"))
