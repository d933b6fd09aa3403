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
