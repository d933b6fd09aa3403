from types import SimpleNamespace

import torch
from torch import nn

from icsd.evaluation.extractors import sha256_of
from icsd.training import evaluation

CPU = torch.device("cpu")


class Encoders(nn.Module):
    """Stands for DAMSM: the features of an image are its mean color, those of a caption the number of its words."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.text_encoder = SimpleNamespace(encode=self.sentences)
        self.sides = []

    def image_encoder(self, images):
        self.sides.append(images.shape[-1])
        return SimpleNamespace(whole=images.mean((2, 3)))

    def sentences(self, captions):
        counts = torch.tensor([float(len(caption.split())) for caption in captions])
        return SimpleNamespace(sentence=counts[:, None].expand(-1, 3))


def test_released_encoders_rank_captions_under_the_hashes_of_both_files(monkeypatch, tmp_path):
    for name in ("text_encoder7.pth", "image_encoder7.pth"):
        (tmp_path / name).write_bytes(name.encode())
    network, calls = Encoders(), []
    monkeypatch.setattr(evaluation, "load_damsm", lambda *given: calls.append(given) or (network, None))
    encoder = evaluation.load_damsm_encoder("independent_encoder", tmp_path, CPU, "words")
    assert calls == [(tmp_path, 299, "words")]
    digests = [sha256_of(tmp_path / name)[:12] for name in ("text_encoder7.pth", "image_encoder7.pth")]
    assert encoder.identity == f"AttnGAN's encoders {digests[0]} and {digests[1]}"
    colors = torch.tensor([[255, 0, 51], [0, 102, 0]], dtype=torch.uint8)
    features = encoder.images(colors[:, :, None, None].expand(-1, -1, 8, 8))
    torch.testing.assert_close(features, colors / 127.5 - 1)
    assert network.sides == [299]
    assert encoder.sentences(["a bird", "red"]).tolist() == [[2.0] * 3, [1.0] * 3]
