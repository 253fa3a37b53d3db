from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fixtures_data import make_cub, make_folder, write_image
from recast_exp.config import DatasetConfig
from recast_exp.data import check_dataset, load_dataset, names
from recast_exp.data.base import ImageSet, Samples, carve_validation, split_by_class
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.loader import EpochBatchSampler, EpochSampler
from recast_exp.data.transforms import InputSpec, RandomShift, eval_transform, train_transform
from recast_exp.errors import MissingInputError, UserError

ROOT = Path(__file__).parent.parent
SPEC = InputSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=0.9, interpolation="bicubic")
TRANSFORMS = ("standard", "light", "authors", "shift", "none")


def load(name: str, data_dir: Path | str = "nowhere", **options: Any) -> ImageSet:
    return load_dataset(DatasetConfig(name=name, **options), data_dir)


def digits(**options: Any) -> ImageSet:
    return load("digits", **options)


def module(image_set: ImageSet, transform: str = "standard", *, workers: int | None = 0, **options: Any) -> Any:
    settings = {"batch_size": 8, "eval_batch_size": 16, "seed": 7, **options}
    return ImageDataModule(image_set, SPEC, transform, num_workers=workers, **settings)


def epochs(data: ImageDataModule, numbers: range) -> list[tuple[Tensor, Tensor]]:
    """The training batches of some epochs, on one loader as in a run."""
    loader = data.train_dataloader()
    batches = []
    for epoch in numbers:
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def assert_one_line(error: pytest.ExceptionInfo[UserError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message


# Registry


def test_every_dataset_has_its_two_functions_and_a_preset() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    assert {"digits", "cub", "folder"} <= set(names()) <= presets


def test_checks_import_nothing_heavy() -> None:
    code = (
        "import importlib, sys, recast_exp.data as data\n"
        "for name in data.names(): importlib.import_module(f'recast_exp.data.{name}').check\n"
        "print([m for m in ('numpy', 'torch', 'torchvision', 'sklearn', 'PIL', 'lightning') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_dataset() -> None:
    with pytest.raises(UserError) as error:
        load("birds")
    assert_one_line(error, "dataset.name", "'birds'", "cub, digits, folder")


# Splits


def test_split_by_class_is_stratified_disjoint_and_fixed() -> None:
    labels = np.repeat(np.arange(3), (50, 10, 3))
    parts = split_by_class(labels, (0.6, 0.2, 0.2), 5, "abc")
    assert sorted(np.concatenate(parts)) == list(range(63))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[30, 6, 1], [10, 2, 1], [10, 2, 1]]
    again = split_by_class(labels, (0.6, 0.2, 0.2), 5, "abc")
    other = split_by_class(labels, (0.6, 0.2, 0.2), 6, "abc")
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def test_carved_validation_has_every_class() -> None:
    samples = Samples(tuple(Path(str(i)) for i in range(8)), np.array([0, 1] * 4))
    train, val = carve_validation(samples, 0.01, 0, "ab")
    assert len(train) == 6
    assert sorted(val.labels) == [0, 1]
    assert {*train.images} | {*val.images} == {*samples.images}


def test_a_class_too_small_to_be_carved() -> None:
    samples = Samples((Path("a"), Path("b"), Path("c")), np.array([0, 0, 1]))
    with pytest.raises(UserError) as error:
        carve_validation(samples, 0.5, 0, ("wren", "crow"))
    assert_one_line(error, "class crow", "1 image")


def test_image_set_names_what_is_empty() -> None:
    some, none = Samples((Path("a"),), np.array([0])), Samples((), np.array([], dtype=np.int64))
    with pytest.raises(UserError, match="the val split has no image"):
        ImageSet("x", ("wren",), {"train": some, "val": none, "test": some})
    with pytest.raises(UserError, match="no training image of class crow"):
        ImageSet("x", ("wren", "crow"), {"train": some, "val": some, "test": some})


# Digits


@pytest.mark.parametrize(("part", "first", "last"), [(None, 5, 9), ("target", 5, 9), ("source", 0, 4), ("all", 0, 9)])
def test_digits_parts(part: str | None, first: int, last: int) -> None:
    image_set = digits(part=part)
    assert image_set.classes == tuple(str(digit) for digit in range(first, last + 1))
    for samples in image_set.splits.values():
        assert samples.images.shape == (len(samples), 8, 8, 3)
        assert samples.images.dtype == np.uint8
        assert samples.labels.dtype == np.int64
        assert set(samples.labels) == set(range(last - first + 1))
        assert samples.images.min() == 0
        assert samples.images.max() == 255


def test_digits_splits_are_fixed_and_labels_belong_to_their_images() -> None:
    from sklearn.datasets import load_digits

    image_set = digits()
    assert image_set.describe() == {
        "name": "digits", "classes": ["5", "6", "7", "8", "9"], "images": {"train": 359, "val": 178, "test": 359}
    }  # fmt: skip
    # The very first images, so that a change of the split does not go unnoticed
    data = load_digits()
    originals = {(image * 255 / 16).round().astype(np.uint8).tobytes(): i for i, image in enumerate(data.images)}
    found = {
        split: [originals[image[..., 0].tobytes()] for image in samples.images]
        for split, samples in image_set.splits.items()
    }
    assert {split: indices[:4] for split, indices in found.items()} == {
        'train': [8, 18, 25, 27], 'val': [7, 9, 17, 31], 'test': [5, 6, 15, 16]
    }  # fmt: skip
    assert len({i for indices in found.values() for i in indices}) == 896
    for split, samples in image_set.splits.items():
        assert (data.target[found[split]] == samples.labels + 5).all()
    assert not np.array_equal(digits(split_seed=1).splits["train"].images, image_set.splits["train"].images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"part": "odd"}, ("dataset.part", "'odd'", "target, source, all")),
        ({"path": "here"}, ("dataset.path", "'here'", "leave it out")),
    ],
)
def test_digits_refuses(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        check_dataset(DatasetConfig(name="digits", **options), "data")
    assert_one_line(error, *expected)


# CUB


def test_cub_maps_class_numbers_with_gaps(tmp_path: Path) -> None:
    root = make_cub(tmp_path, numbers=(12, 1, 4))
    for image_set in (load("cub", tmp_path), load("cub", "nowhere", path=str(root))):
        assert image_set.classes == ("001.Bird_1", "004.Bird_4", "012.Bird_12")
        assert image_set.describe()["images"] == {"train": 9, "val": 3, "test": 6}
        for samples in image_set.splits.values():
            assert [image_set.classes[label] for label in samples.labels] == [p.parent.name for p in samples.images]
        tests = {path.name for path in image_set.splits["test"].images}
        assert tests == {"Bird_0004.jpg", "Bird_0005.jpg"}


def test_cub_missing(tmp_path: Path) -> None:
    cfg = DatasetConfig(name="cub")
    with pytest.raises(MissingInputError) as error:
        check_dataset(cfg, tmp_path)
    assert_one_line(error, f"no folder {tmp_path / 'CUB_200_2011'}", "images.txt", "https://", "data_dir=")
    root = make_cub(tmp_path)
    check_dataset(cfg, tmp_path)
    (root / "images.txt").unlink()
    with pytest.raises(MissingInputError) as error:
        check_dataset(cfg, tmp_path)
    assert_one_line(error, f"{root} has no images.txt")


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("images.txt", b"2", ("images.txt, line 2", "'2'")),
        ("images.txt", b"two 001.Bird_1/x.jpg", ("images.txt, line 2", "'two 001")),
        ("images.txt", b"2 \xff\xfe\x00", ("images.txt, line 2", "expected a number")),
        ("images.txt", b"1 001.Bird_1/Bird_0001.jpg", ("images.txt, line 2", "a second time")),
        ("images.txt", b"2 001.Bird_1/gone.jpg", ("gone.jpg: missing", "images.txt lists it")),
        ("images.txt", b"99 001.Bird_1/Bird_0001.jpg", ("image_class_labels.txt, line 2", "image 2 is not in")),
        ("image_class_labels.txt", b"2 77", ("image_class_labels.txt, line 2", "'77'", "one of 1, 4, 12")),
        ("image_class_labels.txt", b"99 1", ("image_class_labels.txt, line 2", "image 99 is not in")),
        ("train_test_split.txt", b"2 yes", ("train_test_split.txt, line 2", "'yes'", "one of 1, 0")),
        ("classes.txt", b"", ("classes.txt, line 2", "''")),
    ],
)
def test_cub_damaged_lists(tmp_path: Path, file: str, line: bytes, expected: tuple[str, ...]) -> None:
    path = make_cub(tmp_path) / file
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(UserError) as error:
        load("cub", tmp_path)
    assert_one_line(error, *expected)


def test_cub_lists_of_different_length(tmp_path: Path) -> None:
    path = make_cub(tmp_path) / "train_test_split.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError) as error:
        load("cub", tmp_path)
    assert_one_line(error, "train_test_split.txt: nothing about image 18")


def test_cub_real_images() -> None:
    data_dir = ROOT.parent / "shared" / "data"
    if not (data_dir / "CUB_200_2011").is_dir():
        pytest.skip("no real images: there is no ../shared/data/CUB_200_2011")
    image_set = load("cub", data_dir)
    assert image_set.describe()["images"] == {"train": 200, "val": 50, "test": 250}
    assert image_set.classes[0] == "001.Black_footed_Albatross"
    assert image_set.classes[-1] == "050.Eared_Grebe"
    assert all(np.bincount(samples.labels).tolist() == [len(samples) // 10] * 10 for samples in image_set.splits.values())  # fmt: skip # noqa: E501
    images, labels = next(iter(module(image_set, "authors", workers=2).train_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert labels.max() < 10


# Folder


def test_folder_without_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, ("class10", "class2", "Train"), count=10)
    make_folder(tmp_path / "class2", ("more",), count=5)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "class2" / "notes.txt").write_text("not an image")
    image_set = load("folder", path=str(tmp_path))
    assert image_set.classes == ("class2", "class10", "Train")
    assert image_set.describe()["images"] == {"train": 21, "val": 7, "test": 7}
    everything = [path for samples in image_set.splits.values() for path in samples.images]
    assert len(set(everything)) == 35


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    for split, count in {"train": 4, val: 2, "test": 3}.items():
        make_folder(tmp_path / split, count=count)
    image_set = load("folder", path=str(tmp_path))
    assert image_set.classes == ("class2", "class10")
    assert image_set.describe()["images"] == {"train": 8, "val": 4, "test": 6}
    assert {path.parent.parent.name for path in image_set.splits["val"].images} == {val}


def test_folder_without_validation(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_folder(tmp_path / split)
    image_set = load("folder", path=str(tmp_path), val_fraction=0.4)
    assert image_set.describe()["images"] == {"train": 6, "val": 4, "test": 10}


def test_folder_errors(tmp_path: Path) -> None:
    def check(*expected: object, missing: bool = False, path: Path | None = tmp_path) -> None:
        with pytest.raises(MissingInputError if missing else UserError) as error:
            load("folder", path=path and str(path))
        assert_one_line(error, *expected)

    check("dataset.path: got nothing", "dataset.path=PATH", path=None)
    check("no folder", tmp_path / "gone", missing=True, path=tmp_path / "gone")
    check("no folders in", tmp_path, missing=True)
    make_folder(tmp_path / "train")
    check("has train but no test", "PATH/{train,val,test}/CLASS")
    make_folder(tmp_path / "test", ("class2", "class11"))
    check("train and test differ in the class folders class10, class11")
    make_folder(tmp_path / "test", ("class10",))
    (tmp_path / "train" / "class11").mkdir()
    check(tmp_path / "train" / "class11", "no image in this class folder")
    make_folder(tmp_path / "train", ("class11",), count=1)
    check("class class11: 1 image(s)")
    for name in ("val", "valid"):
        make_folder(tmp_path / name)
    check("val and valid are the same split")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_one_line_from_any_process(tmp_path: Path, workers: int, content: bytes | None) -> None:
    bad = make_folder(tmp_path) / "class2" / "0.png"
    bad.write_bytes(bad.read_bytes()[:-200] if content is None else content)
    data = module(load("folder", path=str(tmp_path)), workers=workers)
    with pytest.raises(UserError) as error:
        [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert_one_line(error, bad, "cannot be read as an image")


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    for i, mode in enumerate(("L", "RGBA", "P", "1", "LA", "RGB")):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new(mode, (9 + i, 7)).save(tmp_path / name / f"{mode}.png")
    images, _ = next(iter(module(load("folder", path=str(tmp_path))).train_dataloader()))
    assert images.shape[1:] == (3, 16, 16)


# Transforms


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(8, 8), (50, 31), (20, 64)])
def test_transforms_give_uint8_squares(name: str, size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    transform = train_transform(name, SPEC)
    torch.manual_seed(0)
    result = transform(pixels)
    torch.manual_seed(0)
    from_pil = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert type(result) is Tensor
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.uint8
    assert torch.equal(result, from_pil)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_random_where_they_should_be(name: str) -> None:
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    transform = train_transform(name, SPEC)
    different = {transform(pixels).numpy().tobytes() for _ in range(16)}
    assert len(different) == {"none": 1, "light": 2}.get(name, 16)


def test_eval_transform_keeps_the_aspect_and_the_centre() -> None:
    spec = InputSpec(size=20, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.5, interpolation="bilinear")
    pixels = torch.zeros(3, 80, 160, dtype=torch.uint8)
    pixels[:, 20:60, 60:100] = 255  # exactly the centre that is kept: half of the short side
    assert (eval_transform(spec)(pixels)[:, 1:-1, 1:-1] == 255).all()
    pixels = 255 - pixels
    assert (eval_transform(spec)(pixels)[:, 1:-1, 1:-1] == 0).all()


def test_shift_moves_and_scales_within_its_bounds_and_continues_the_border() -> None:
    torch.manual_seed(0)
    bright = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    assert (RandomShift()(bright) == 200).all()
    square = torch.zeros(3, 100, 100, dtype=torch.uint8)
    square[:, 30:70, 30:70] = 255
    sides, centres = [], []
    for _ in range(100):
        rows = torch.nonzero(RandomShift(translate=0.06, scale=0.1)(square)[0].amax(1) > 127)
        sides.append(len(rows))
        centres.append(rows.float().mean().item() - 49.5)
    assert 35 <= min(sides) < 38
    assert 42 < max(sides) <= 45
    assert -7.5 <= min(centres) < -4
    assert 4 < max(centres) <= 7.5


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"dataset\.transform: got 'heavy', takes one of standard"):
        train_transform("heavy", SPEC)
    with pytest.raises(UserError, match="'lanczos', takes one of bilinear, bicubic"):
        InputSpec(16, (0.0,) * 3, (1.0,) * 3, 1.0, "lanczos")


# Sampling


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 10, 12, 13])
def test_evaluation_shares_every_sample_once(size: int, world_size: int) -> None:
    shares = [EpochSampler(size, None, rank, world_size) for rank in range(world_size)]
    assert Counter(index for share in shares for _, index in share) == Counter(range(size))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [2, 10, 12, 13])
def test_training_shares_are_equal_and_complete(size: int, world_size: int) -> None:
    shares = [list(EpochSampler(size, 3, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for _, index in share} == set(range(size))


def test_the_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    def first_batch(world_size: int) -> set[Any]:
        samplers = [EpochSampler(40, 3, rank, world_size) for rank in range(world_size)]
        return {key for s in samplers for key in next(iter(EpochBatchSampler(s, 12 // world_size, allow_single=False)))}

    assert first_batch(1) == first_batch(2) == first_batch(3)


@pytest.mark.parametrize(
    ("size", "batch_size", "single", "expected"),
    [
        (10, 4, False, [4, 4, 2]),
        (8, 4, False, [4, 4]),
        (9, 4, False, [4, 5]),
        (9, 4, True, [4, 4, 1]),
        (3, 2, False, [3]),
        (1, 4, False, [1]),
        (3, 1, False, [1, 1, 1]),
    ],
)
def test_no_last_batch_of_one(size: int, batch_size: int, single: bool, expected: list[int]) -> None:
    batches = EpochBatchSampler(EpochSampler(size, 3), batch_size, allow_single=single)
    assert [len(batch) for batch in batches] == expected
    assert len(batches) == len(expected)
    assert sorted(index for batch in batches for _, index in batch) == list(range(size))


# Data module


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_training_repeats_to_the_bit_with_any_number_of_workers(tmp_path: Path, transform: str) -> None:
    make_folder(tmp_path, count=12)
    image_set = load("folder", path=str(tmp_path))
    straight = epochs(module(image_set, transform), range(4))
    assert_same(straight, epochs(module(image_set, transform, workers=2), range(4)))
    resumed = epochs(module(image_set, transform, workers=2), range(3, 4))
    assert_same(straight[-len(resumed) :], resumed)
    other_seed = epochs(module(image_set, transform, seed=8), range(4))
    assert not torch.equal(straight[0][0], other_seed[0][0])
    assert not torch.equal(straight[0][0], straight[len(resumed)][0])


def test_batch_size_does_not_change_the_augmentation() -> None:
    image_set = digits()
    images = torch.cat([images for images, _ in epochs(module(image_set, "shift", batch_size=8), range(1))])
    others = torch.cat([images for images, _ in epochs(module(image_set, "shift", batch_size=50), range(1))])
    assert torch.equal(images, others)


def test_the_generator_of_the_caller_is_untouched(tmp_path: Path) -> None:
    for image_set in (digits(), load("folder", path=str(make_folder(tmp_path)))):
        for workers in (0, 2):
            data = module(image_set, "authors", workers=workers)
            torch.manual_seed(1)
            before, threads = torch.get_rng_state(), torch.get_num_threads()
            list(data.train_dataloader())
            list(data.val_dataloader())
            assert torch.equal(before, torch.get_rng_state())
            assert torch.get_num_threads() == threads


def test_evaluation_is_deterministic_and_in_order() -> None:
    image_set = digits()
    data = module(image_set, "authors")
    for split, loader in {"val": data.val_dataloader(), "test": data.test_dataloader()}.items():
        first, second = list(loader), list(loader)
        assert_same(first, second)
        assert torch.equal(torch.cat([labels for _, labels in first]), torch.from_numpy(image_set.splits[split].labels))
        expected = eval_transform(SPEC)(torch.from_numpy(image_set.splits[split].images[3]).permute(2, 0, 1))
        assert torch.equal(first[0][0][3], expected)


def test_batches_are_normalised_after_the_transfer() -> None:
    data = module(digits())
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    normalised, same_labels = data.on_after_batch_transfer((images, labels), 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    torch.testing.assert_close(normalised, (images / 255 - mean) / std)
    assert same_labels is labels


def test_workers_are_chosen_by_size(tmp_path: Path) -> None:
    assert module(digits(), workers=None).num_workers == 0
    assert 1 <= module(load("folder", path=str(make_folder(tmp_path))), workers=None).num_workers <= 4
    assert module(digits(), workers=3).num_workers == 3


def test_a_batch_must_divide_among_the_devices() -> None:
    class FakeTrainer:
        global_rank, world_size = 1, 3

    data = module(digits(), batch_size=8)
    data.trainer = FakeTrainer()
    with pytest.raises(UserError) as error:
        data.train_dataloader()
    assert_one_line(error, "dataset.batch_size: got 8", "multiple of the 3 devices")


class Recorder(lightning.LightningModule):
    """Records the pixels it sees in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append((images.clone(), labels.clone()))
        return torch.nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", ["train", "validation"])
def test_lightning_continues_with_the_right_epoch(tmp_path: Path, workers: int, at: str) -> None:
    def fit(max_epochs: int, checkpoint: str | None = None) -> Recorder:
        torch.manual_seed(0)
        model = Recorder()
        saver = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path / "checkpoints", "{epoch}", save_top_k=-1, save_on_train_epoch_end=at == "train"
        )
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=max_epochs, callbacks=[saver], logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=1,
        )  # fmt: skip
        data = module(digits(), "shift", workers=workers, batch_size=64)
        trainer.fit(model, data, ckpt_path=checkpoint)
        return model

    whole = fit(4)
    assert sorted(whole.seen) == [0, 1, 2, 3]
    assert not torch.equal(whole.seen[0][0][0], whole.seen[1][0][0])
    resumed = fit(4, str(tmp_path / "checkpoints" / "epoch=1.ckpt"))
    assert sorted(resumed.seen) == [2, 3]
    for epoch, batches in resumed.seen.items():
        assert_same(whole.seen[epoch], batches)


def test_description_is_json(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "extra.jpg", seed=0)
    make_folder(tmp_path, ("a", "b"))
    description = load("folder", path=str(tmp_path)).describe()
    assert json.loads(json.dumps(description)) == description
