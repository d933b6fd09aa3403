import torch

from icsd.models.attention import WordAttention


def make(seed=0, batch=3, words=5):
    torch.manual_seed(seed)
    return WordAttention(6, 4), torch.randn(batch, 4, 2, 3), torch.randn(batch, 6, words)


def test_shapes_and_convexity():
    attend, hidden, words = make()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    context, attention = attend(hidden, words, mask)
    assert context.shape == hidden.shape
    assert attention.shape == (3, 2, 3, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 3))
    assert (attention[1, ..., 2:] == 0).all()
    assert (attention[2, ..., 0] == 1).all()


def test_padding_of_any_sample_never_matters():
    attend, hidden, words = make()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    context, _ = attend(hidden, words, mask)
    garbage = torch.where(mask.unsqueeze(1), words, torch.full_like(words, 1e4))
    torch.testing.assert_close(attend(hidden, garbage, mask)[0], context, rtol=0, atol=0)


def test_each_sample_alone_gives_the_same():
    attend, hidden, words = make()
    lengths = [5, 2, 3]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    context, _ = attend(hidden, words, mask)
    for i, length in enumerate(lengths):
        alone, _ = attend(hidden[i : i + 1], words[i : i + 1, :, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(alone[0], context[i])


def test_matches_a_loop_over_pixels():
    attend, hidden, words = make(batch=1, words=3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    context, _ = attend(hidden, words, mask)
    values = attend.project.weight[:, :, 0] @ words[0]
    for y in range(2):
        for x in range(3):
            weights = torch.softmax(values.T @ hidden[0, :, y, x], dim=0)
            torch.testing.assert_close(context[0, :, y, x], values @ weights)
