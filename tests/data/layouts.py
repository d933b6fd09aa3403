"""Drawn sets in the layouts of the published ones, at a hundredth of their size."""

import io
import random
import struct
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

from icsd.data import DataConfig, open_dataset, tokenize

CUB = "CUB_200_2011"


def drawn(name, size, seed=0):
    """Return (class number from 1, image, captions) of each image by split; no class is in both."""
    config = DataConfig(name=name, size=size, holdout="unseen-class", seed=seed)
    sets = {split: open_dataset(config, split, 48) for split in ("train", "test")}
    order = sorted({number for dataset in sets.values() for number in dataset.class_ids})
    return {
        split: [
            (order.index(number) + 1, Image.fromarray(image.permute(1, 2, 0).numpy()), captions)
            for number, image, captions in zip(dataset.class_ids, dataset.images, dataset.captions, strict=True)
        ]
        for split, dataset in sets.items()
    }


def write_cub(root, size=40):
    """Write CUB-200-2011 (``CUB_200_2011``), AttnGAN's metadata (``birds``) and Reed's captions (``cvpr2016_cub``).

    Returns the names of the images, ``<class>/<image>`` without suffix, by split.
    """
    draw = random.Random(0)
    names, captions_of, rows = {}, {}, []
    for split, images in drawn("procedural-birds", size).items():
        names[split] = []
        for number, bird, captions in images:
            class_name = f"{number:03d}.Drawn_Bird_{number}"
            stem = (
                f"Drawn_Bird_{number}_{sum(name.startswith(class_name) for name in names[split]) + 1:04d}_{len(rows)}"
            )
            image = Image.new("RGB", (draw.randint(60, 110), draw.randint(60, 90)), (90, 120, 60))
            left, top = draw.randint(0, image.width - 48), draw.randint(0, image.height - 48)
            image.paste(bird, (left, top))
            _save(image, root / CUB / "images" / class_name / f"{stem}.jpg")
            rows.append((number, f"{class_name}/{stem}", (left, top, 48, 48)))
            names[split].append(f"{class_name}/{stem}")
            captions_of[f"{class_name}/{stem}"] = captions
    rows.sort()
    lines = {
        "images.txt": [f"{i} {name}.jpg" for i, (_, name, _) in enumerate(rows, 1)],
        "bounding_boxes.txt": [f"{i} {x:.1f} {y:.1f} {w:.1f} {h:.1f}" for i, (*_, (x, y, w, h)) in enumerate(rows, 1)],
        "image_class_labels.txt": [f"{i} {number}" for i, (number, *_) in enumerate(rows, 1)],
        "train_test_split.txt": [f"{i} {i % 2}" for i in range(1, len(rows) + 1)],
        "classes.txt": [
            f"{number} {name}" for number, name in sorted({(row[0], row[1].split("/")[0]) for row in rows})
        ],
        "README": ["Text-to-image synthesis does not use the split of train_test_split.txt."],
        "attributes/certainties.txt": ["1 not visible", "2 guessing", "3 probably", "4 definitely"],
        "parts/parts.txt": ["1 back", "2 beak"],
    }
    for file, content in lines.items():
        _write(root / CUB / file, "".join(f"{line}\n" for line in content))

    vocabulary = [
        "<end>",
        *sorted({w for lines in captions_of.values() for line in lines for w in tokenize(line)})[::-1],
    ]
    index = {word: place for place, word in enumerate(vocabulary)}
    encoded = []
    for split in ("train", "test"):
        _write(root / "birds" / split / "filenames.pickle", python2_pickle(names[split]))
        _write(root / "birds" / split / "class_info.pickle", python2_pickle([int(name[:3]) for name in names[split]]))
        captions = [line for name in names[split] for line in captions_of[name]]
        encoded.append([[index[word] for word in tokenize(caption)] for caption in captions])
    _write(root / "birds" / "captions.pickle", python2_pickle([*encoded, dict(enumerate(vocabulary)), index]))
    _write(root / "birds" / "example_captions.txt", "a red bird\n")
    for name, captions in captions_of.items():
        _write(root / "birds" / "text" / f"{name}.txt", "".join(f"{caption}\n" for caption in captions))
        _write(root / "cvpr2016_cub" / "text_c10" / f"{name}.txt", "".join(f"{caption}\n" for caption in captions))
    _write_class_lists(root / "cvpr2016_cub", names)
    return names


def write_oxford(root, size=40):
    """Write Oxford-102 (``jpg``, ``imagelabels.mat``) and Reed's captions (``cvpr2016_flowers``).

    Returns the names of the images, ``<class>/<image>`` without suffix, by split.
    """
    names, count = {}, 0
    for split, images in drawn("procedural-flowers", size).items():
        names[split] = []
        for number, flower, captions in images:
            count += 1
            name = f"class_{number:05d}/image_{count:05d}"
            names[split].append(name)
            _save(flower.resize((72, 56)), root / "jpg" / f"image_{count:05d}.jpg")
            text = "".join(f"{caption}\n" for caption in captions)
            _write(root / "cvpr2016_flowers" / "text_c10" / f"{name}.txt", text)
    _write(root / "imagelabels.mat", b"MATLAB 5.0 MAT-file")
    _write_class_lists(root / "cvpr2016_flowers", names)
    return names


def write_shards(root, images, size, prefix=""):
    """Write (image, captions, class) triples as WebDataset shards of ``size`` samples."""
    root.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), size):
        with tarfile.open(root / f"{prefix}{start // size:06d}.tar", "w") as shard:
            for place, (image, captions, number) in enumerate(images[start : start + size]):
                encoded = io.BytesIO()
                image.save(encoded, "JPEG", quality=95)
                members = {
                    "jpg": encoded.getvalue(),
                    "txt": "\n".join(captions).encode(),
                    "cls": str(number).encode(),
                }
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{place:04d}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def pack(folder, archive, base=None):
    """Write a folder as .zip, .tar or .tgz, its files under ``base`` (its own name by default)."""
    base = folder.name if base is None else base
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for file in files:
                out.write(file, Path(base) / file.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as out:
            for file in files:
                out.add(file, str(Path(base) / file.relative_to(folder)))
    return archive


def python2_pickle(value):
    """Pickle lists, dicts, numbers and Latin-1 strings in the opcodes of Python 2's ``str``."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value):
    if isinstance(value, str):
        data = value.encode("latin1")
        return b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    items = [item for pair in value.items() for item in pair] if isinstance(value, dict) else value
    return b"(" + b"".join(map(_opcodes, items)) + (b"d" if isinstance(value, dict) else b"l")


def _write_class_lists(root, names):
    for split, file in (("train", "trainvalclasses.txt"), ("test", "testclasses.txt")):
        classes = sorted({name.split("/")[0] for name in names[split]})
        _write(root / file, "\n".join(classes))  # as published: no final newline


def _save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
