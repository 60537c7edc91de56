"""Decoding: the pixels of each kind of picture, and the pictures that are refused early."""

import struct
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from registry.core.errors import ImageTooLarge, InvalidImage, UnsupportedImageType, UsageError
from registry.model.image import decode
from registry.model.image.decode import FORMATS, decode_image, decode_training_image, encode_png
from registry.model.image.limits import VARIABLES, DecodeLimits
from registry.model.manifest import PreprocessSpec
from tests.hostile_pictures import chunk, encoded, png, webp_claiming

GREY = PreprocessSpec(mode="L", width_px=8, height_px=6, mean=(0.5,), std=(0.5,))
COLOUR = PreprocessSpec(mode="RGB", width_px=8, height_px=6, mean=(0.5,) * 3, std=(0.5,) * 3)
PHOTO = PreprocessSpec(
    mode="RGB", width_px=224, height_px=224, resize_shorter_px=256, mean=(0,) * 3, std=(1,) * 3
)


def halves(width: int = 8, height: int = 6) -> Image.Image:
    """A picture whose left half is red and right half is blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_a_png_decodes_to_the_same_pixels(seed: int, channels: int) -> None:
    spec = GREY if channels == 1 else COLOUR
    pixels = np.random.default_rng(seed).integers(0, 256, spec.shape, dtype=np.uint8)
    decoded = decode_image(encode_png(pixels), spec)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_accepted_formats_are_decoded(kind: str) -> None:
    pixels = decode_image(encoded(halves(64, 48), kind, quality=95), COLOUR)
    assert pixels.shape == (6, 8, 3)
    assert pixels[3, 1, 0] > 200 > 60 > pixels[3, 1, 2]
    assert pixels[3, 6, 2] > 200 > 60 > pixels[3, 6, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_training_and_serving_decode_the_same_pixels(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    np.testing.assert_array_equal(
        decode_image(data, COLOUR), decode_training_image(data, COLOUR)[0]
    )


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_a_tiff_has_the_pixels_that_were_written(mode: str, compression: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    if mode.startswith("I"):
        wide = noise[..., 0].astype(np.uint16) * 257
        image = Image.fromarray(wide.astype(">u2") if mode == "I;16B" else wide)
    else:
        opaque = Image.fromarray(noise[..., :3]).convert(mode)
        image = Image.fromarray(noise) if mode == "RGBA" else opaque
    exif = Image.Exif()
    exif[0x010E] = "x" * 2000  # a description, which is dropped
    data = encoded(image, "TIFF", compression=compression, exif=exif)
    expected = decode_image(encoded(image, "PNG") if mode != "CMYK" else data, COLOUR)
    np.testing.assert_array_equal(decode_image(data, COLOUR), expected)


def test_a_tiff_is_turned_upright_and_bigtiff_is_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode_image(encoded(halves(), "TIFF", exif=exif), COLOUR)
    assert turned[0, 0].tolist() == [0, 0, 255]
    big = encoded(halves(64, 48), "TIFF", big_tiff=True)
    with pytest.raises(InvalidImage, match="BigTIFF"):
        decode_image(big, COLOUR)


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (encoded(halves(), "TIFF", compression="jpeg"), "TIFF compression 7.*deflate"),
        (
            encoded(halves().convert("1"), "TIFF", compression="group4"),
            "TIFF compression 4.*deflate",
        ),
        (b"P3\n1 1\n255\n0 0 0\n", "P3.*binary"),
        (b"P6\n1 1\n100\n\0\0\0", "largest value is 100.*255"),
    ],
)
def test_the_error_for_a_variant_that_is_not_accepted_names_it(data: bytes, advice: str) -> None:
    with pytest.raises(InvalidImage, match=advice):
        decode_image(data, COLOUR)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(halves(), "AVIF"), "an AVIF image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"%PDF-1.7", "not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image"),
    ],
)
def test_the_error_for_a_format_that_is_not_accepted_names_it(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedImageType, match=name):
        decode_image(data, COLOUR)


def test_sixteen_bit_grey_is_scaled_not_saturated() -> None:
    wide = np.full((6, 8), 32768, dtype=np.uint16)
    wide[0, 0] = 65535
    pixels = decode_image(encoded(Image.fromarray(wide)), GREY)
    assert pixels[3, 3, 0] == 128
    assert pixels[0, 0, 0] == 255


def test_the_transparent_value_of_sixteen_bit_grey_becomes_white() -> None:
    wide = Image.fromarray(np.array([[0, 257], [514, 65535]], dtype=np.uint16))
    spec = PreprocessSpec(mode="L", width_px=2, height_px=2, mean=(0.5,), std=(0.5,))
    data = encoded(wide)
    assert decode_image(data, spec)[..., 0].tolist() == [[0, 1], [2, 255]]
    at = data.index(b"IDAT") - 4
    transparent = data[:at] + chunk(b"tRNS", b"\x01\x01") + data[at:]
    assert decode_image(transparent, spec)[..., 0].tolist() == [[0, 255], [2, 255]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_value_of_grey_with_few_bits_becomes_white(bits: int) -> None:
    values = [0, 1] if bits == 1 else [0, 1, 2, 3]
    step = 255 // (2**bits - 1)
    packed = int("".join(f"{value:0{bits}b}" for value in values).ljust(32, "0")[:32], 2)
    row = b"\0" + packed.to_bytes(4, "big")[: -(-bits * len(values) // 8)]
    spec = PreprocessSpec(mode="L", width_px=len(values), height_px=1, mean=(0.5,), std=(0.5,))
    plain = png(len(values), 1, row, bits=bits, kind=0)
    assert decode_image(plain, spec).ravel().tolist() == [value * step for value in values]
    clear = png(len(values), 1, row, chunk(b"tRNS", b"\0\1"), bits=bits, kind=0)
    expected = [255 if value == 1 else value * step for value in values]
    assert decode_image(clear, spec).ravel().tolist() == expected


def test_only_the_exact_transparent_value_of_sixteen_bit_colour_becomes_white() -> None:
    colours = [(0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD), (0x1235, 0x5678, 0x9ABC)]
    row = b"\0" + struct.pack(">9H", *(value for colour in colours for value in colour))
    data = png(3, 1, row, chunk(b"tRNS", struct.pack(">3H", *colours[0])), bits=16)
    spec = PreprocessSpec(mode="RGB", width_px=3, height_px=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert decode_image(data, spec).tolist() == [
        [[255] * 3, [0x12, 0x56, 0x9A], [0x12, 0x56, 0x9A]]
    ]


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_picture_of_many_bands_has_no_seams(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(3).integers(0, 2**16, (48, 64, 4), dtype=np.uint16)
    wide = Image.fromarray(noise[..., 0])
    image = wide if mode == "I;16" else Image.fromarray((noise >> 8).astype(np.uint8))
    in_one_band = decode_image(encoded(image), COLOUR)
    monkeypatch.setattr(decode, "BAND_PIXELS", 64 * 5)
    np.testing.assert_array_equal(decode_image(encoded(image), COLOUR), in_one_band)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_texts_and_profiles_in_a_png_do_not_change_its_pixels(kind: str) -> None:
    text = PngInfo()
    if kind == "zTXt":
        text.add_text("workflow", "x" * 1_500_000, zip=True)
    elif kind == "iTXt":
        text.add_itxt("XML:com.adobe.xmp", "<x/>" * 500_000, zip=True)
    options = {"icc_profile": bytes(1_500_000)} if kind == "iCCP" else {"pnginfo": text}
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(halves(), exif=exif, **options)
    assert kind.encode() in data
    assert decode_image(data, COLOUR)[0, 0].tolist() == [0, 0, 255]  # turned by its EXIF


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert (decode_image(encoded(clear), COLOUR) == 255).all()
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (decode_image(encoded(palette, transparency=0), COLOUR) == 255).all()


def test_cmyk_is_converted() -> None:
    cmyk = Image.new("CMYK", (64, 48), (0, 255, 255, 0))  # red ink
    pixels = decode_image(encoded(cmyk, "JPEG", quality=95), COLOUR)
    assert pixels[3, 3, 0] > 200 > 60 > pixels[3, 3, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_exif_orientations_come_out_upright(orientation: int) -> None:
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("black", (0, 0, 8, 4))  # no rotation or reflection maps this mark onto itself
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    spec = PreprocessSpec(mode="L", width_px=24, height_px=16, mean=(0.5,), std=(0.5,))
    pixels = decode_image(encoded(stored, exif=exif), spec)
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(upright.convert("L")))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_image(encoded(halves(), exif=exif), COLOUR)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("tag", [0x011A, 0x0100, 0x0103])
def test_a_picture_with_another_odd_exif_tag_is_accepted(tag: int) -> None:
    """Cameras and editors write text into a tag for a number."""
    entries = sorted([(0x0112, 3, 1, b"\3\0\0\0"), (tag, 2, 4, b"odd\0")])
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)
    data = encoded(halves(64, 48), "JPEG", exif=exif, quality=95)
    assert decode_image(data, COLOUR)[3, 1, 2] > 200  # turned: blue is on the left


def test_a_picture_with_broken_exif_is_accepted() -> None:
    data = encoded(halves(), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(data, COLOUR)[0, 0, 0] == 255


def test_copies_in_other_formats_have_the_same_digest() -> None:
    digests = {
        decode_training_image(encoded(halves(), kind), COLOUR)[1] for kind in ("PNG", "BMP", "TIFF")
    }
    assert len(digests) == 1
    assert decode_training_image(encoded(halves(9)), COLOUR)[1] not in digests


def test_exif_can_be_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(halves(), exif=exif)
    ignoring = PreprocessSpec(
        mode="RGB", width_px=8, height_px=6, mean=(0.5,) * 3, std=(0.5,) * 3, exif="ignore"
    )
    assert decode_image(data, ignoring)[0, 0, 0] == 255
    assert decode_image(data, COLOUR)[0, 0, 0] == 0


def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert decode_image(data, COLOUR)[0, 0].tolist() == [255, 0, 0]


def test_the_shorter_side_is_resized_and_the_centre_cut_out() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    spec = PreprocessSpec(
        mode="RGB", width_px=10, height_px=10, mean=(0.5,) * 3, std=(0.5,) * 3, resize_shorter_px=10
    )
    pixels = decode_image(encoded(wide), spec)
    assert (pixels[:, 1:-1, 2] > 250).all()
    same = decode_image(encode_png(pixels), spec)
    np.testing.assert_array_equal(same, pixels)


@pytest.mark.parametrize("size", [(10_000, 5_001), (13_400, 13_400), (20_000, 20_000)])
def test_a_header_that_claims_too_many_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLarge, match=r"pixels"):
        decode_image(png(*size), COLOUR)


def test_a_thin_strip_is_refused_by_its_aspect() -> None:
    with pytest.raises(ImageTooLarge, match="longer side"):
        decode_image(encoded(Image.new("L", (600, 2))), COLOUR, DecodeLimits(max_aspect=50))


def test_a_picture_within_the_pixel_limit_is_refused_if_decoding_it_takes_too_much_memory() -> None:
    assert decode_image(encoded(Image.new("1", (5_000, 5_000))), COLOUR).shape == COLOUR.shape
    for data in (
        png(6_000, 5_000),
        png(5_000, 5_000, bits=16),
        webp_claiming(5_000, 4_000),
    ):
        with pytest.raises(ImageTooLarge, match="has to hold"):
            decode_image(data, COLOUR)


@pytest.mark.parametrize(
    ("size", "options", "is_accepted"),
    [
        ((8160, 6120), {}, True),  # phones with 50 megapixels write this
        ((8161, 6121), {}, True),
        ((8160, 6120), {"progressive": True}, True),
        ((8160, 6120), {"progressive": True, "subsampling": 0}, False),
        ((8160, 6128), {}, False),
    ],
)
def test_a_phones_photograph_is_accepted_and_larger_ones_are_refused(
    size: tuple[int, int], options: dict[str, object], is_accepted: bool
) -> None:
    data = encoded(Image.new("RGB", size, "teal"), "JPEG", **options)
    if is_accepted:
        assert decode_image(data, PHOTO).shape == PHOTO.shape
    else:
        with pytest.raises(ImageTooLarge):
            decode_image(data, PHOTO)


def test_a_jpeg_that_cannot_be_shrunk_enough_is_refused() -> None:
    data = encoded(Image.new("L", (50_000, 1_000)), "JPEG")
    with pytest.raises(ImageTooLarge, match="has to hold 150,000,000 bytes"):
        decode_image(data, PHOTO)


def test_training_reads_its_limits_from_the_services_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(halves())
    monkeypatch.setenv("CONVOY_MAX_PIXELS", "47")
    with pytest.raises(ImageTooLarge, match=r"at most 47 are accepted; .*CONVOY_MAX_PIXELS"):
        decode_training_image(data, COLOUR)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["many", "0", "-1", "500000001"])
def test_the_error_for_an_unusable_limit_names_its_variable(name: str, value: str) -> None:
    """No limit may be above those with which a published version is proved again."""
    with pytest.raises(UsageError, match=f" - at {name}='{value}'$"):
        DecodeLimits.from_environment({name: value})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_invalid(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(InvalidImage, match="cannot be decoded"):
        decode_image(data[: len(data) // 2], COLOUR)


def test_a_file_damaged_in_the_middle_is_invalid() -> None:
    """A second load by Pillow would return the half that it had decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise)))
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    with pytest.raises(InvalidImage, match="cannot be decoded"):
        decode_image(bytes(data), COLOUR)
    with pytest.raises(InvalidImage, match="cannot be decoded"):
        decode_training_image(bytes(data), COLOUR)


def test_floating_point_pixels_are_invalid() -> None:
    data = encoded(Image.new("F", (8, 6)), "TIFF")
    with pytest.raises(InvalidImage, match="floating-point"):
        decode_image(data, COLOUR)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutant_raises_anything_but_the_three_errors(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    original = bytearray(encoded(halves(16, 12), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    refusal = ""
    try:
        assert decode_image(bytes(original), COLOUR).shape == COLOUR.shape
    except (InvalidImage, UnsupportedImageType, ImageTooLarge) as error:
        refusal = str(error)
    assert "0x" not in refusal  # Pillow puts addresses of its buffers into messages


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    "size",
    [
        (4032, 3024),  # a phone's photograph: 1/4 keeps three times the 256 px that are needed
        (1200, 1200),
        (4041, 3025),  # the picture covers only a part of the last row and column
        (4241, 2829),
    ],
)
def test_a_large_jpeg_is_decoded_at_a_smaller_size_and_its_pixels_stay_close(
    size: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings = Image.radial_gradient("L").resize(size).convert("RGB")
    rings.paste("red", (0, 0, size[0] // 3, size[1] // 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(rings, "JPEG", quality=95, exif=exif)
    smaller = decode_image(data, PHOTO).astype(int)
    monkeypatch.setattr(decode, "REDUCING_GAP", 10**6)
    full = decode_image(data, PHOTO)
    difference = np.abs(smaller - full)
    assert 0 < difference.max() <= 24  # at the edge of the square
    assert difference.mean() < 0.3


def test_training_and_serving_decode_the_same_pixels_of_a_large_jpeg() -> None:
    spec = PreprocessSpec(mode="L", width_px=16, height_px=16, mean=(0.5,), std=(0.5,))
    buffer = BytesIO()
    Image.radial_gradient("L").resize((640, 512)).save(buffer, "JPEG")
    trained, _ = decode_training_image(buffer.getvalue(), spec)
    np.testing.assert_array_equal(trained, decode_image(buffer.getvalue(), spec))


def test_training_decodes_jpegs_over_servings_memory_limit_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.new("RGB", (640, 512)), "JPEG")
    original, alone = decode._bands, []

    def recorded(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
        alone.append(decode.WHOLE_LARGE.locked())
        return original(image)

    monkeypatch.setattr(decode, "_bands", recorded)
    for max_bytes in (640 * 512 * 3, 640 * 512 * 3 - 1):
        decode_training_image(data, COLOUR, DecodeLimits(max_decoded_bytes=max_bytes))
    assert alone == [False, True]
    assert not decode.WHOLE_LARGE.locked()


@pytest.mark.parametrize(
    ("data", "limits", "parts"),
    [
        (encoded(halves(), "JPEG", progressive=True), DecodeLimits(max_scans=1), "scans"),
        (encoded(halves(), "JPEG"), DecodeLimits(max_parts=3), "markers"),
        (encoded(halves(), "WEBP", exif=b"Exif\0\0II*\0"), DecodeLimits(max_parts=2), "chunks"),
        (encoded(halves(), "GIF", comment="x"), DecodeLimits(max_parts=0), "blocks"),
        (encoded(halves(), "TIFF"), DecodeLimits(max_parts=3), "entries"),
        (encoded(halves()), DecodeLimits(max_parts=1), "chunks"),
    ],
)
def test_more_parts_than_allowed_are_refused(data: bytes, limits: DecodeLimits, parts: str) -> None:
    assert decode_image(data, COLOUR).shape == COLOUR.shape
    with pytest.raises(ImageTooLarge, match=f"more than . {parts}"):
        decode_image(data, COLOUR, limits)


def test_scans_of_a_thumbnail_or_after_the_picture_do_not_count() -> None:
    thumbnail = encoded(halves(), "JPEG")
    data = encoded(halves(), "JPEG", comment=thumbnail) + b"\xff\xda" * 100
    assert decode_image(data, COLOUR, DecodeLimits(max_scans=1)).shape == COLOUR.shape
