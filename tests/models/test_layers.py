import pytest
import torch
from torch import nn
from torch.nn import functional as F

from icsd.models.layers import FEWEST_TRANSPOSED, GLU, JointConv2d, PatchConv2d, UpsampleConv2d, WholeConv2d


def check_same(layer, plain, x, weight):
    """The layer is the plain function: its value, its gradients by input and weight, and the gradient's gradient."""
    results = []
    for function in (layer, plain):
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        gradients = torch.autograd.grad(y.square().sum(), (leaf, weight), create_graph=True)
        results.append([y, *gradients, *torch.autograd.grad(gradients[0].square().sum(), (leaf, weight))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", [8, 16])
def test_upsampling_and_convolution_are_one(side):
    assert 2 * 8 * 8 < FEWEST_TRANSPOSED <= 2 * 16 * 16
    torch.manual_seed(0)
    layer = UpsampleConv2d(3, 5).double()
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1, bias=False)).double()

    def upsampled(x):
        return F.conv2d(plain[0](x), layer.weight, padding=1)

    check_same(layer, upsampled, torch.randn(2, 3, side, side, dtype=torch.float64), layer.weight)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())


def test_upsampled_images_do_not_depend_on_the_number_of_them():
    torch.manual_seed(0)
    layer = UpsampleConv2d(64, 64).eval()
    x = torch.randn(16, 64, 8, 8)
    for images in (x, x[:1]):  # of which one is a transposed convolution in training
        assert torch.equal(layer(images), F.conv2d(F.interpolate(images, scale_factor=2), layer.weight, padding=1))


@pytest.mark.parametrize(("size", "stride"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("out_channels", [2, 200])
def test_product_of_patches_is_a_convolution(size, stride, out_channels):
    torch.manual_seed(0)
    layer = PatchConv2d(3, out_channels, size, stride).double()

    def convolved(x):
        return F.conv2d(x, layer.weight, stride=stride, padding=1)

    for layout in (torch.channels_last, torch.contiguous_format):
        layer.to(memory_format=layout)
        check_same(layer, convolved, torch.randn(2, 3, 8, 8, dtype=torch.float64), layer.weight)


def test_the_weight_of_a_product_of_patches_has_the_shape_and_state_of_a_convolution():
    layer, plain = PatchConv2d(3, 8, 4, stride=2), nn.Conv2d(3, 8, 4, stride=2, padding=1, bias=False)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("out_channels", [6, 200])  # the maps by a convolution, by a matrix product
@pytest.mark.parametrize("pairs", [3, 4, 6])
def test_joint_convolution_is_that_of_concatenated_channels(side, out_channels, pairs):
    torch.manual_seed(0)
    layer = JointConv2d(3, 2, out_channels, side).double()
    maps, vectors = torch.randn(3, 3, side, side).double(), torch.randn(pairs, 2).double()

    def concatenated(maps, vectors):
        tiled = vectors[..., None, None].expand(-1, -1, side, side)
        return F.conv2d(torch.cat((torch.cat((maps, maps))[:pairs], tiled), 1), layer.weight, padding=1)

    check_same(lambda x: layer(x, vectors), lambda x: concatenated(x, vectors), maps, layer.weight)
    check_same(lambda x: layer(maps, x), lambda x: concatenated(maps, x), vectors, layer.weight)


@pytest.mark.parametrize("pairs", [1, 5])
def test_joint_convolution_refuses_vectors_without_a_map(pairs):
    with pytest.raises(ValueError, match=f"vectors must be 2 to 4 for 2 maps, got {pairs}"):
        JointConv2d(3, 2, 6, 4)(torch.randn(2, 3, 4, 4), torch.randn(pairs, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_of_the_whole_map_is_a_product(layout):
    torch.manual_seed(0)
    layer = WholeConv2d(5, 2, 3).double().to(memory_format=layout)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64).to(memory_format=layout)
    check_same(layer, lambda x: F.conv2d(x, layer.weight, layer.bias).flatten(1), x, layer.weight)


def test_weights_begin_as_those_of_a_convolution():
    torch.manual_seed(0)
    plain, ours = nn.Conv2d(16, 64, 4, bias=False).weight, PatchConv2d(16, 64, 4).weight
    assert ours.abs().max().item() == pytest.approx(plain.abs().max().item(), rel=1e-3)
    assert ours.std().item() == pytest.approx(plain.std().item(), rel=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gate_is_that_of_torch_and_keeps_the_layout(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(GLU()(x), F.glu(x, 1))
    ours, theirs = (torch.autograd.grad(gate(x).square().sum(), x)[0] for gate in (GLU(), nn.GLU(1)))
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=layout)
