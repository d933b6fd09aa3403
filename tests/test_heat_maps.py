import numpy as np
import pytest
import torch
from PIL import Image

from icsd.heat_maps import draw_attention, draw_similarities


def attention_of(side, words):
    weights = torch.zeros(side, side, words)
    weights[..., 0] = 1
    weights[: side // 2, :, 0], weights[: side // 2, :, 1] = 0, 1
    return weights


def colors(page):
    return len(page.getcolors(1 << 24))


@pytest.mark.parametrize("words", [2, 7, 8, 18])
def test_every_word_has_a_map_at_every_stage(words):
    names = [f"word{index}" for index in range(words)]
    image = torch.zeros(3, 32, 32)
    one = draw_attention(image, [attention_of(8, words)], names, title="a title")
    two = draw_attention(image, [attention_of(8, words), attention_of(16, words)], names, title="a title")
    assert one.mode == two.mode == "RGB"
    assert one.width == two.width
    assert two.height > 1.5 * one.height


def test_attention_is_drawn_bright_where_it_is_paid():
    names = ["first", "second"]
    page = draw_attention(torch.ones(3, 8, 8), [attention_of(4, 2)], names, title="")
    pixels = np.asarray(page).astype(int)
    black = (pixels.sum(2) < 20).any(0)  # inferno begins with black: the columns that hold maps
    bright = ((pixels[..., 0] > 240) & (pixels[..., 1] > 240) & (pixels[..., 2] < 180)).any(0)
    assert (black & bright).sum() > 100  # both maps have both


@pytest.mark.parametrize("count", [2, 10, 40])
@pytest.mark.parametrize("stages", [1, 3])
def test_similarities_are_drawn_for_any_number_of_samples(count, stages):
    matrix = torch.eye(count) * 0.5 + 0.5
    labels = ["a very long sentence about a woman with dark skin, firefighter (seed 0)"] * count
    page = draw_similarities([matrix] * stages, labels, ["stage"] * stages, title="a title", footer="by someone")
    assert page.mode == "RGB"
    assert max(page.size) < 6000


def test_colors_follow_the_range_of_the_values():
    high = draw_similarities([torch.tensor([[1.0, 0.9], [0.9, 1.0]])], ["one", "two"], ["stage"], title="")
    mixed = draw_similarities([torch.tensor([[1.0, -0.9], [-0.9, 1.0]])], ["one", "two"], ["stage"], title="")
    assert np.asarray(high).tolist() != np.asarray(mixed).tolist()


@pytest.mark.parametrize("text", ["$x^2$ and $", "süß, été", "漢字", "\\frac", "two\nlines", "%s {}", "\udce9"])
def test_any_text_can_be_drawn(text):
    matrix = torch.eye(2)
    assert isinstance(draw_similarities([matrix], [text, "b"], ["stage"], title=text, footer=text), Image.Image)
    page = draw_attention(torch.zeros(3, 8, 8), [attention_of(4, 2)], [text, "b"], title=text, footer=text)
    assert colors(page) > 4


def test_equal_input_gives_equal_pages():
    pages = [draw_similarities([torch.eye(3)], list("abc"), ["stage"], title="t").tobytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_values_that_are_not_numbers_do_not_stop_the_page():
    assert draw_similarities([torch.full((2, 2), torch.nan)], ["a", "b"], ["stage"], title="").width > 100
    assert draw_attention(torch.zeros(3, 8, 8), [torch.full((4, 4, 2), torch.nan)], ["a", "b"], title="").width > 100
