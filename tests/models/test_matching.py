import math

import torch
from torch.nn import functional as F

from icsd.models import MatchingHead, matching_loss


def test_head_gives_one_vector_per_image():
    assert MatchingHead(16, 5)(torch.randn(3, 16, 4, 4)).shape == (3, 5)


def test_loss_is_the_mean_of_both_directions():
    torch.manual_seed(0)
    images, sentences = torch.randn(2, 4, 6)
    cosines = F.cosine_similarity(images[:, None], sentences[None], dim=-1)
    rows, columns = (-torch.log_softmax(10 * cosines, dim=dim).diagonal().mean() for dim in (1, 0))
    torch.testing.assert_close(matching_loss(images, sentences), (rows + columns) / 2)


def test_matching_pairs_cost_less_than_chance_and_mismatched_more():
    sentences = torch.eye(5)
    assert matching_loss(sentences, sentences) < 0.01
    assert matching_loss(sentences.roll(1, 0), sentences) > math.log(5)
    torch.testing.assert_close(matching_loss(torch.ones(5, 5), torch.ones(5, 5)), torch.tensor(math.log(5)))


def test_autocast_does_not_lower_the_precision():
    torch.manual_seed(0)
    images, sentences = torch.randn(2, 4, 6)
    expected = matching_loss(images, sentences)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(matching_loss(images, sentences), expected)


def test_images_that_share_a_caption_are_no_wrong_answers():
    torch.manual_seed(0)
    images, sentences = torch.randn(5, 6), torch.randn(5, 6)
    caption_ids = torch.tensor([0, 1, 0, 2, 1])
    cosines = F.cosine_similarity(images[:, None], sentences[None], dim=-1)
    total = 0.0
    for own in range(5):
        others = [k for k in range(5) if k == own or caption_ids[k] != caption_ids[own]]
        for scores in (cosines[own, others], cosines[others, own]):
            total -= torch.log_softmax(10 * scores, 0)[others.index(own)] / 5
    torch.testing.assert_close(matching_loss(images, sentences, caption_ids), total / 2)
    assert matching_loss(images, sentences, torch.arange(5)) == matching_loss(images, sentences)


def test_a_batch_of_one_caption_has_no_loss_and_no_gradient():
    images = torch.randn(4, 6, requires_grad=True)
    loss = matching_loss(images, torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert images.grad.abs().max() == 0
