"""Generators of tiny datasets in their official layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_cub(data_dir: Path, numbers: tuple[int, ...] = (1, 4, 12), train: int = 4, test: int = 2) -> Path:
    """Write CUB_200_2011 below `data_dir`, with the class numbers given; return its folder."""
    root = data_dir / "CUB_200_2011"
    names = {number: f"{number:03d}.Bird_{number}" for number in numbers}
    images, labels, split = [], [], []
    for number, name in names.items():
        for i in range(train + test):
            image = len(images) + 1
            images.append(f"{image} {name}/Bird_{i:04d}.jpg")
            labels.append(f"{image} {number}")
            split.append(f"{image} {int(i % (train + test) < train)}")
            write_image(root / "images" / name / f"Bird_{i:04d}.jpg", seed=image)
    for file, lines in {
        "classes.txt": [f"{number} {name}" for number, name in names.items()],
        "images.txt": images,
        "image_class_labels.txt": labels,
        "train_test_split.txt": split,
    }.items():
        (root / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def make_folder(root: Path, classes: tuple[str, ...] = ("class2", "class10"), count: int = 5) -> Path:
    """Write `count` images of each class below `root`; return it."""
    for label, name in enumerate(classes):
        for i in range(count):
            write_image(root / name / f"{i}.png", seed=100 * label + i, size=(12, 10))
    return root
