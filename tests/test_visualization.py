import pytest
import torch
from PIL import Image

from icsd.errors import InputError
from icsd.visualization import caption_grid, save_animation, stack_pages

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(color, count, resolution):
    return (torch.tensor(color) / 127.5 - 1).view(1, 3, 1, 1).expand(count, 3, resolution, resolution)


def width_of(page, color):
    """Columns of the page that hold the color."""
    pixels = torch.tensor(list(page.tobytes())).view(page.height, page.width, 3)
    return int((pixels == torch.tensor(color)).all(-1).any(0).sum())


def test_stages_lie_side_by_side_at_one_size():
    page = caption_grid([plain(RED, 4, 16), plain(BLUE, 4, 32)], ["a sentence"] * 4, columns=1)
    assert page.mode == "RGB"
    assert width_of(page, RED) == width_of(page, BLUE) == 128 - 2  # a frame of one pixel each side


def test_enlarging_repeats_pixels():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    page = caption_grid([image], [""], side=64)
    pixels = torch.tensor(list(page.tobytes())).view(page.height, page.width, 3)
    corner = pixels[24 + 4 : 24 + 8, 24 + 4 : 24 + 8]
    assert (corner == corner[0, 0]).all()
    assert corner[0, 0].tolist() == image[0, :, 1, 1].add(1).mul(127.5).round().int().tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 32])
@pytest.mark.parametrize("resolutions", [[32], [16, 32], [64, 128, 256]])
def test_pages_are_neither_very_wide_nor_very_high(count, resolutions):
    page = caption_grid([plain(RED, count, r) for r in resolutions], ["a woman with dark skin, firefighter"] * count)
    assert 0.3 < page.width / page.height < 6


def test_headers_title_and_footer_take_room():
    stages, captions = [plain(RED, 2, 16)] * 2, ["one", "two"]
    bare = caption_grid(stages, captions, headers=[])
    headed = caption_grid(stages, captions)
    full = caption_grid(stages, captions, title="Title", footer="Art: somebody, CC-BY 4.0", headers=["coarse", "fine"])
    assert bare.width == headed.width == full.width
    assert bare.height < headed.height < full.height


def test_captions_wrap_within_a_limit():
    heights = [
        caption_grid([plain(RED, 1, 16)], [caption]).height
        for caption in ("", "word", "a few more words than one line", "word " * 200, "x" * 500)
    ]
    assert heights[0] < heights[1] < heights[2] < heights[3] == heights[4]


@pytest.mark.parametrize("caption", ["süß, été", "漢字", "‘–…’ 🙂", "two\nlines\tand a tab", "\udce9"])
def test_any_caption_can_be_drawn(caption):
    assert caption_grid([plain(RED, 1, 16)], [caption], title=caption, footer=caption).width > 100


def test_values_out_of_range_are_clamped():
    image = torch.full((1, 3, 16, 16), 9.0)
    image[:, 1:] = -9.0
    assert width_of(caption_grid([image], ["red"]), RED) > 100
    caption_grid([torch.full((1, 3, 16, 16), float("nan"))], ["not a number"])


def test_half_precision_and_gradients_are_accepted():
    image = plain(RED, 1, 16).to(torch.bfloat16).requires_grad_()
    assert width_of(caption_grid([image], ["red"]), RED) > 100


def test_a_grid_without_images_can_be_drawn():
    assert caption_grid([torch.zeros(0, 3, 16, 16)], []).height > 0


def test_pages_are_stacked():
    red, blue = Image.new("RGB", (20, 10), "#ff0000"), Image.new("RGB", (30, 5), "#0000ff")
    page = stack_pages([red, blue])
    assert page.size == (30, 15)
    assert width_of(page, RED) == 20
    assert width_of(page, BLUE) == 30


@pytest.mark.parametrize(("fps", "duration"), [(8, 120), (20, 50)])
def test_an_animation_keeps_frames_and_time(tmp_path, fps, duration):
    frames = [Image.new("RGB", (21, 11), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
    save_animation(frames, tmp_path / "a.gif", fps)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size) == (3, (21, 11))
        assert image.info["duration"] == duration
        image.seek(2)
        assert image.convert("RGB").getpixel((5, 5)) == BLUE


def test_a_video_keeps_frames_of_odd_sizes(tmp_path):
    av = pytest.importorskip("av")
    save_animation([Image.new("RGB", (21, 11), "#ff0000")] * 3, tmp_path / "a.mp4", 10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 3
    assert (frames[0].width, frames[0].height) == (22, 12)


def test_other_animations_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"give a \.gif or \.mp4 file"):
        save_animation([Image.new("RGB", (4, 4))], tmp_path / "a.avi", 8)
