"""Generators of tiny datasets in their official layouts."""

from __future__ import annotations

import bz2
import json
import pickle
import struct
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


def make_flowers(data_dir: Path, numbers: tuple[int, ...] = (46, 51, 73), per_split: int = 2) -> Path:
    """Write flowers-102 with some of the official class numbers, `per_split` images of each in each split."""
    from scipy.io import savemat

    root = data_dir / "flowers-102"
    labels, ids = [], {"trnid": [], "valid": [], "tstid": []}
    for number in numbers:
        for split in ids.values():
            for _ in range(per_split):
                labels.append(number)
                split.append(len(labels))
                write_image(root / "jpg" / f"image_{len(labels):05d}.jpg", seed=len(labels))
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(root / "setid.mat", {key: np.array([images], dtype=np.uint16) for key, images in ids.items()})
    return root


AIRCRAFT = (("F/A-18", "F/A-18", "McDonnell Douglas"), ("737-200", "Boeing 737", "Boeing"), ("747-100", "Boeing 747", "Boeing"))  # fmt: skip # noqa: E501
"""Variant, family and manufacturer."""


def make_aircraft(data_dir: Path, per_split: int = 2) -> Path:
    """Write fgvc-aircraft-2013b with the classes of `AIRCRAFT`, `per_split` images of each variant in each split."""
    root = data_dir / "fgvc-aircraft-2013b"
    lists: dict[str, list[str]] = {}
    for number, names in enumerate(AIRCRAFT):
        for i in range(3 * per_split):
            image, split = f"{10 * number + i:07d}", ("train", "val", "test")[i % 3]
            write_image(root / "data" / "images" / f"{image}.jpg", seed=10 * number + i)
            for level, name in zip(("variant", "family", "manufacturer"), names, strict=True):
                lists.setdefault(f"images_{level}_{split}.txt", []).append(f"{image} {name}")
    for column, file in enumerate(("variants.txt", "families.txt", "manufacturers.txt")):
        lists[file] = sorted({names[column] for names in AIRCRAFT})
    for file, lines in lists.items():
        (root / "data" / file).write_text("\n".join(lines) + "\n")
    return root


def make_scenes(data_dir: Path, classes: tuple[str, ...] = ("bar", "airport_inside"), train: int = 4) -> Path:
    """Write indoor67 with `train` training images and one test image of each class."""
    root = data_dir / "indoor67"
    lists: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for label, name in enumerate(classes):
        for i in range(train + 1):
            write_image(root / "Images" / name / f"a room {i}.jpg", seed=10 * label + i)
            lists["TrainImages.txt" if i < train else "TestImages.txt"].append(f"{name}/a room {i}.jpg")
    for file, lines in lists.items():
        (root / file).write_text("\n".join(lines))
    return root


def make_cifar(data_dir: Path, classes: int = 10, per_class: int = 2) -> Path:
    """Write CIFAR-10 or CIFAR-100. All pixels of an image are its label; the last one numbers its batch."""
    fine = classes == 100
    root = data_dir / ("cifar-100-python" if fine else "cifar-10-batches-py")
    root.mkdir(parents=True)
    batches = ("train", "test") if fine else (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    labels = [*range(classes)] * per_class
    for number, file in enumerate(batches):
        data = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, axis=1)
        data[:, -1] = number
        batch = {"data": data, **({"fine_labels": labels, "coarse_labels": labels} if fine else {"labels": labels})}
        (root / file).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"fine_label_names" if fine else "label_names": [f"thing {i}" for i in range(classes)]}
    (root / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(names, protocol=2))
    return root


def make_torchvision(data_dir: Path, name: str) -> None:
    """Write a set that torchvision's class `name` opens, with three classes, four training and two test images each."""
    counts = {"train": 4, "test": 2}
    if name == "DTD":
        for split, count in {**counts, "val": 1}.items():
            files = [f"{kind}/{kind}_{split}{i}.jpg" for kind in ("banded", "dotted", "woven") for i in range(count)]
            for seed, file in enumerate(files):
                write_image(data_dir / "dtd" / "dtd" / "images" / file, seed=seed)
            (data_dir / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
            (data_dir / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(files))
    elif name == "EuroSAT":
        make_folder(data_dir / "eurosat" / "2750", ("Forest", "Highway", "River"), count=6)
    elif name == "OxfordIIITPet":
        root = data_dir / "oxford-iiit-pet"
        for split, count in counts.items():
            lines = []
            for label, kind in enumerate(("Abyssinian", "american_bulldog", "Bengal"), 1):
                for i in range(count):
                    write_image(root / "images" / f"{kind}_{split}{i}.jpg", seed=10 * label + i)
                    lines.append(f"{kind}_{split}{i} {label} 1 1")
            (root / "annotations").mkdir(exist_ok=True)
            (root / "annotations" / f"{'trainval' if split == 'train' else split}.txt").write_text("\n".join(lines))
    elif name == "GTSRB":
        root, lines = data_dir / "gtsrb", ["Filename;Width;ClassId"]
        for label in (0, 7, 42):
            for i in range(4):
                write_image(root / "GTSRB" / "Training" / f"{label:05d}" / f"{i:05d}.ppm", seed=i)
            for i in range(2):
                write_image(root / "GTSRB" / "Final_Test" / "Images" / f"{100 * i + label:05d}.ppm", seed=i)
                lines.append(f"{100 * i + label:05d}.ppm;40;{label}")
        (root / "GT-final_test.csv").write_text("\n".join(lines))
    elif name == "SVHN":
        from scipy.io import savemat

        for split, count in counts.items():
            labels = np.array([1, 2, 10] * count, dtype=np.uint8)  # 10 stands for the digit 0
            pixels = np.broadcast_to(labels, (32, 32, 3, len(labels)))
            savemat(data_dir / f"{split}_32x32.mat", {"X": pixels, "y": labels[:, None]})
    elif name in ("MNIST", "EMNIST"):
        root = data_dir / name / "raw"
        root.mkdir(parents=True)
        parts = ("train", "t10k") if name == "MNIST" else ("emnist-balanced-train", "emnist-balanced-test")
        for part, count in zip(parts, (4, 2), strict=True):
            labels = np.array([0, 1, 2] * count, dtype=np.uint8)
            pixels = np.broadcast_to(labels[:, None, None], (len(labels), 28, 28))
            (root / f"{part}-images-idx3-ubyte").write_bytes(
                struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes()
            )
            (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels.tobytes())
    elif name == "USPS":
        for file, count in {"usps.bz2": 4, "usps.t.bz2": 2}.items():
            lines = [f"{label} " + " ".join(f"{i}:{label / 10}" for i in range(1, 257)) for label in (1, 2, 3)] * count
            (data_dir / file).write_bytes(bz2.compress("\n".join(lines).encode()))
    elif name == "STL10":
        root = data_dir / "stl10_binary"
        root.mkdir()
        (root / "unlabeled_X.bin").touch()
        (root / "class_names.txt").write_text("airplane\nbird\ncar\n")
        for split, count in counts.items():
            labels = np.array([1, 2, 3] * count, dtype=np.uint8)
            pixels = np.broadcast_to(labels[:, None, None, None], (len(labels), 3, 96, 96))
            (root / f"{split}_X.bin").write_bytes(pixels.tobytes())
            (root / f"{split}_y.bin").write_bytes(labels.tobytes())
    elif name == "Caltech101":
        make_numbered(
            data_dir / "caltech101" / "101_ObjectCategories",
            dict.fromkeys(("BACKGROUND_Google", "ant", "bass", "crab"), "image_{:04d}.jpg"),
            6,
        )
    elif name == "Caltech256":
        files = {"001.ant": "001_{:04d}.jpg", "002.bass": "002_{:04d}.jpg", "003.crab": "003_{:04d}.jpg"}
        make_numbered(data_dir / "caltech256" / "256_ObjectCategories", files, 6)
    elif name == "SUN397":
        make_numbered(data_dir / "SUN397", dict.fromkeys(("a/abbey", "b/bar", "c/church/outdoor"), "sun_{:04d}.jpg"), 6)
        (data_dir / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/b/bar\n/c/church/outdoor\n")
    elif name == "Food101":
        root = data_dir / "food-101"
        make_numbered(root / "images", dict.fromkeys(("cake", "pie", "ribs"), "{:04d}.jpg"), 6)
        (root / "meta").mkdir()
        for split, images in {"train": range(1, 5), "test": range(5, 7)}.items():
            listed = {kind: [f"{kind}/{i:04d}" for i in images] for kind in ("cake", "pie", "ribs")}
            (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    elif name in ("Country211", "RenderedSST2"):
        classes = ("AD", "AE", "AF") if name == "Country211" else ("negative", "positive")
        for split, count in {**counts, "valid": 1}.items():
            make_folder(data_dir / ("country211" if name == "Country211" else "rendered-sst2") / split, classes, count)
    elif name == "Imagenette":
        for split, count in {"train": 4, "val": 2}.items():
            kinds = ("n01440764", "n02102040", "n02979186")
            make_numbered(data_dir / "imagenette2-160" / split, dict.fromkeys(kinds, split + "{}.jpeg"), count)
    elif name == "CLEVRClassification":
        root = data_dir / "clevr" / "CLEVR_v1.0"
        (root / "scenes").mkdir(parents=True)
        for split, count in {"train": 4, "val": 2}.items():
            scenes = [{"image_filename": f"{i}.png", "objects": [0] * (3 + i // count)} for i in range(3 * count)]
            make_numbered(root / "images", {split: "{}.png"}, 3 * count, first=0)
            (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    elif name == "StanfordCars":
        from scipy.io import savemat

        root = data_dir / "stanford_cars"
        (root / "devkit").mkdir(parents=True)
        names = np.array(["Acura", "BMW", "Fiat"], dtype=object)
        savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
        for split, count in counts.items():
            make_numbered(root, {f"cars_{split}": "{:05d}.jpg"}, 3 * count)
            cars = np.array(
                [(f"{i:05d}.jpg", 1 + i % 3) for i in range(1, 3 * count + 1)], dtype=[("fname", "O"), ("class", "O")]
            )
            file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
            savemat(root / file, {"annotations": cars})
    elif name == "FER2013":
        (data_dir / "fer2013").mkdir()
        pixels = [" ".join([str(label)] * 48 * 48) for label in range(3)]
        usages = ["Training"] * 4 + ["PublicTest", "PrivateTest"]
        lines = [f"{label},{pixels[label]},{usage}" for usage in usages for label in range(3)]
        (data_dir / "fer2013" / "fer2013.csv").write_text("\n".join(["emotion,pixels,Usage", *lines]))
    else:
        raise ValueError(name)


def make_numbered(root: Path, files: dict[str, str], count: int, first: int = 1) -> None:
    """Write `count` images to each folder below `root`, with names in the given format."""
    for number, (folder, name) in enumerate(files.items()):
        for i in range(first, first + count):
            write_image(root / folder / name.format(i), seed=100 * number + i, size=(12, 10))
