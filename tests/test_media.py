from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from mobius_train.data.clips import open_clips
from mobius_train.errors import MobiusError
from mobius_train.media import fonts
from mobius_train.media.clip_files import file_names, prompt_in_name, write_clips
from mobius_train.media.comparison import write_comparison
from mobius_train.media.contact_sheet import contact_sheet
from mobius_train.media.gif import write_gif
from mobius_train.media.pixels import enlarge_frames
from mobius_train.media.video import write_mp4


def moving_square(num_frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    """A shaded square that moves over white."""
    frames = torch.full((num_frames, 3, height, width), 255, dtype=torch.uint8)
    for number in range(num_frames):
        x = 3 * (number % 12)
        shade = torch.arange(12, dtype=torch.uint8) * 10 + 21
        frames[number, 0, 4:16, x : x + 12] = shade
        frames[number, 1, 4:16, x : x + 12] = shade.unsqueeze(1)
        frames[number, 2, 4:16, x : x + 12] = 30
    return frames


def read_gif(path: Path) -> Tensor:
    with Image.open(path) as image:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def read_mp4(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def squares_in(sheet: Path) -> float:
    """How many squares a contact sheet shows, by their blue of 30, which is in no grey of the text alone."""
    pixels = np.array(Image.open(sheet))
    return ((pixels[..., 2] == 30) & (pixels[..., 0] != 30)).sum() / (12 * 12 * 4**2)


def mean_error(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def test_a_gif_holds_the_clip(tmp_path: Path) -> None:
    clip = moving_square()
    write_gif(clip, tmp_path / "a.gif", fps=10)
    shown = read_gif(tmp_path / "a.gif")
    assert shown.shape == (5, 3, 192, 288)
    assert mean_error(shown, enlarge_frames(clip, 192)) < 1
    assert mean_error(shown.roll(1, 0), enlarge_frames(clip, 192)) > 5, "the frames differ"
    assert (shown[..., -1, -1] == 255).all(), "white stays white"
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        assert image.info["duration"] == 100


def test_every_colour_of_a_clip_with_few_is_exact(tmp_path: Path) -> None:
    clip = moving_square() // 64 * 64
    write_gif(clip, tmp_path / "a.gif")
    assert torch.equal(read_gif(tmp_path / "a.gif"), enlarge_frames(clip, 192))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (193, 255)])
def test_an_mp4_holds_the_clip_at_even_sizes(tmp_path: Path, height: int, width: int) -> None:
    clip = moving_square(6, height, width)
    write_mp4(clip, tmp_path / "a.mp4", fps=12.5)
    shown = read_mp4(tmp_path / "a.mp4")
    wanted = enlarge_frames(clip, 192)
    assert shown.shape[0] == 6
    assert [size % 2 for size in shown.shape[-2:]] == [0, 0]
    shown = shown[..., : wanted.shape[-2], : wanted.shape[-1]]
    assert mean_error(shown, wanted) < 3
    assert mean_error(shown, 255 - wanted) > 100
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(12.5)


def test_enlarging_repeats_pixels_by_a_whole_factor() -> None:
    frames = moving_square(1, 32, 48)
    large = enlarge_frames(frames, 70)
    assert large.shape == (1, 3, 96, 144)
    assert torch.equal(large[..., 1::3, 1::3], frames)
    assert torch.equal(enlarge_frames(frames, 32), frames)


def test_a_sheet_shows_every_clip_whatever_its_caption(tmp_path: Path) -> None:
    captions = ["red heart", "红心 心形", "a" * 300, "", "🔥", "no word of these is short " * 30]
    clips = [moving_square(frames) for frames in (1, 2, 5, 8, 20, 3)]
    contact_sheet(clips, captions, tmp_path / "sheet.png")
    assert squares_in(tmp_path / "sheet.png") == 1 + 2 + 5 + 8 + 8 + 3, "of 20 frames, 8 are shown"
    contact_sheet(clips[:2], captions[:2], tmp_path / "small.png")
    assert squares_in(tmp_path / "small.png") == 1 + 2


def test_captions_are_drawn(tmp_path: Path) -> None:
    contact_sheet([moving_square()], ["red heart"], tmp_path / "one.png")
    contact_sheet([moving_square()], ["red beard"], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_names_are_unique_and_safe() -> None:
    names = file_names(["Red heart!", "red heart", "../../etc/passwd", "红心", "🔥", "x" * 500])
    assert names == ["00-red-heart", "01-red-heart", "02-etc-passwd", "03-红心", "04", "05-" + "x" * 40]


def test_all_formats_are_written(tmp_path: Path) -> None:
    paths = write_clips([moving_square(), moving_square()], ["a cat", "a cat"], tmp_path / "out")
    names = ["00-a-cat.gif", "00-a-cat.mp4", "01-a-cat.gif", "01-a-cat.mp4", "metadata.jsonl", "contact_sheet.png"]
    assert [path.name for path in paths] == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)


@pytest.mark.parametrize(("formats", "suffix"), [(("gif", "mp4", "png"), ".mp4"), (("gif",), ".gif")])
def test_written_clips_are_a_data_set_with_the_exact_prompts(
    tmp_path: Path, formats: tuple[str, ...], suffix: str
) -> None:
    prompts = ['a "cat" / Dog?', "红心"]
    write_clips([moving_square(), moving_square()], prompts, tmp_path, formats)
    entries = open_clips(str(tmp_path), num_frames=2, resolution=16).entries
    assert [(entry.captions[0].text, entry.suffix) for entry in entries] == [(prompt, suffix) for prompt in prompts]


def test_a_contact_sheet_alone_lists_no_clips(tmp_path: Path) -> None:
    write_clips([moving_square()], ["a cat"], tmp_path, formats=["png"])
    assert [path.name for path in tmp_path.iterdir()] == ["contact_sheet.png"]


def test_formats_can_be_chosen(tmp_path: Path) -> None:
    paths = write_clips([moving_square()], ["a cat"], tmp_path, formats=["gif"])
    assert [path.name for path in paths] == ["00-a-cat.gif", "metadata.jsonl"]
    with pytest.raises(MobiusError, match=r"webm.*\bgif, mp4, png\b"):
        write_clips([moving_square()], ["a cat"], tmp_path, formats=["webm"])


def test_stills_are_pictures(tmp_path: Path) -> None:
    still = moving_square(1)
    paths = write_clips([still], ["a cat"], tmp_path)
    assert [path.name for path in paths] == ["00-a-cat.png", "metadata.jsonl", "contact_sheet.png"]
    assert torch.equal(torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1), still[0])


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        write_gif(moving_square().float(), tmp_path / "a.gif")


def test_a_name_has_the_words_of_its_prompt_or_is_known_to_be_cut() -> None:
    known = ["red heart", "红心", "x" * 38, "2 dogs"]
    assert [prompt_in_name(name) for name in file_names(known)] == known
    # The 40th letter of the second is a space.
    unknown = ["🔥", "x" * 39 + " y", "x" * 40, "x" * 41]
    assert [prompt_in_name(name) for name in file_names(unknown)] == [None] * 4


def square_font(path: Path, characters: str, size: int) -> Path:
    """A bitmap font (BDF) in which each of these characters is a full square of `size` pixels."""
    lines = [
        *("STARTFONT 2.1", "FONT test", f"SIZE {size} 75 75", f"FONTBOUNDINGBOX {size} {size} 0 0"),
        *("STARTPROPERTIES 5", f"PIXEL_SIZE {size}", f"FONT_ASCENT {size}", "FONT_DESCENT 0"),
        *('CHARSET_REGISTRY "ISO10646"', 'CHARSET_ENCODING "1"', "ENDPROPERTIES", f"CHARS {len(characters) + 1}"),
    ]
    row = f"{(1 << size) - 1 << -size % 8:0{(size + 7) // 8 * 2}X}"
    for code, rows in ((0, ["0" * len(row)] * size), *((ord(one), [row] * size) for one in characters)):
        lines += [f"STARTCHAR u{code:04X}", f"ENCODING {code}", "SWIDTH 1000 0", f"DWIDTH {size} 0"]
        lines += [f"BBX {size} {size} 0 0", "BITMAP", *rows, "ENDCHAR"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "ENDFONT"]) + "\n")
    return path


@pytest.fixture
def fonts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder of fonts beside Pillow's own."""
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path / "fonts", tmp_path / "none"])
    monkeypatch.setattr(fonts, "EMBEDDED_FONT", tmp_path / "none.ttf")
    caches = (fonts._font_files, fonts._font_of, fonts._face)
    for one in caches:
        one.cache_clear()
    fonts._named.clear()
    yield tmp_path / "fonts"
    for one in caches:
        one.cache_clear()


def test_characters_are_drawn_in_a_font_that_has_them(fonts_in: Path, caplog: pytest.LogCaptureFixture) -> None:
    square_font(fonts_in / "deep" / "half.ttf", "红", 14)
    square_font(fonts_in / "a-cjk.ttf", "红心", 14)
    (fonts_in / "b-cjk.ttf").write_text("damaged")
    sheet = fonts_in.parent / "sheet.png"

    def black(caption: str) -> int:
        contact_sheet([moving_square()], [caption], sheet)
        return int((np.array(Image.open(sheet)) == 0).all(-1).sum())

    # Latin letters stay in Pillow's own font, which has no black square.
    assert black("a") < 14 < 2 * 13 * 14 <= black("a红心") <= 2 * 14 * 14 + black("a")
    assert fonts.caption_length("红心", 14) == 28
    assert fonts.caption_length("a红", 14) == fonts.caption_length("a", 14) + 14
    assert not caplog.records
    write_comparison({"data": [moving_square()]}, ["红\n心"], fonts_in.parent / "comparison.gif")


def test_characters_of_no_font_are_named_once(fonts_in: Path, caplog: pytest.LogCaptureFixture) -> None:
    square_font(fonts_in / "a.ttf", "红", 14)
    for _ in range(2):
        contact_sheet([moving_square()], ["red 红 心"], fonts_in.parent / "sheet.png")
    (record,) = caplog.records
    assert "心" in record.getMessage()
    assert "红" not in record.getMessage()
    assert "Install a font" in record.getMessage()


def test_captions_in_chinese_are_drawn_on_every_machine(
    fonts_in: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = "一只狗在海滩上奔跑，阳光明媚。紅心"
    contact_sheet([moving_square()], [words], fonts_in.parent / "boxes.png")
    assert len(caplog.records) == 1  # the control
    monkeypatch.undo()
    fonts._font_files.cache_clear()
    fonts._font_of.cache_clear()
    fonts._named.clear()
    assert {Path(str(found.path)).name for one in words if (found := fonts._font_of(one, 14))} == {
        "DroidSansFallback.ttf"
    }
    contact_sheet([moving_square()], [words], fonts_in.parent / "chinese.png")
    assert len(caplog.records) == 1
    # What boxes would be is as wide, but not as many pixels.
    boxes, chinese = (np.array(Image.open(fonts_in.parent / f"{name}.png")) for name in ("boxes", "chinese"))
    assert (boxes != 255).sum() != (chinese != 255).sum()
