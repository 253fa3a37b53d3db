from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
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
from safetensors.torch import save_file
from torch import Tensor

from recast_exp.data import store as store_module
from recast_exp.data.datamodule import ImageDataModule, requests
from recast_exp.data.images import read_image
from recast_exp.data.loader import EpochBatchSampler, EpochSampler
from recast_exp.data.preprocessing import Geometry, InputSpec
from recast_exp.data.store import ArrayStore, FileStore, PixelStore, Request, content_hash, open_stores
from recast_exp.data.transforms import Augmentation
from recast_exp.data.types import ImageSet, Samples
from recast_exp.errors import RecastError
from support.fixtures_data import make_cub, make_folder
from support.helpers import assert_one_line, load

SPEC = InputSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=0.9, interpolation="bicubic")
TRANSFORMS = ("standard", "light", "authors", "shift", "none")
MODES = ("off", "ram", "memmap")


def digits(**options: Any) -> ImageSet:
    return load("digits", **options)


def module(
    image_set: ImageSet, transform: str = "standard", *, workers: int | None = 0, mode: str = "off", cache: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    stores = None
    if cache is not None:
        stores = open_stores(requests(image_set, SPEC, transform, build=True), mode, cache, image_set.name)
    settings = {"batch_size": 8, "eval_batch_size": 16, "seed": 7, **options}
    return ImageDataModule(image_set, SPEC, transform, num_workers=workers, stores=stores, **settings)


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


# Images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_one_line_from_any_process(tmp_path: Path, workers: int, content: bytes | None) -> None:
    bad = make_folder(tmp_path) / "class2" / "0.png"
    bad.write_bytes(bad.read_bytes()[:-200] if content is None else content)
    data = module(load("folder", path=str(tmp_path)), workers=workers)
    with pytest.raises(RecastError) as error:
        [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert_one_line(error, bad, "cannot be read as an image")


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    for i, mode in enumerate(("L", "RGBA", "P", "1", "LA", "RGB")):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new(mode, (9 + i, 7)).save(tmp_path / name / f"{mode}.png")
    images, _ = next(iter(module(load("folder", path=str(tmp_path))).train_dataloader()))
    assert images.shape[1:] == (3, 16, 16)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels = read_image(tmp_path / "deep.png")
    assert (pixels.int() - torch.arange(256).view(1, 16, 16)).abs().max() <= 1


# Sampling


def shares(size: int, batch_size: int, world_size: int, seed: int | None = 3) -> list[EpochBatchSampler]:
    sampler = EpochSampler(size, seed)
    return [
        EpochBatchSampler(sampler, batch_size, rank, world_size, allow_single=seed is None)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("seed", [3, None], ids=["training", "evaluation"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 10, 12, 13, 25])
def test_ranks_share_the_batches_of_one_process(size: int, world_size: int, seed: int | None) -> None:
    """Each image counts once, in the batch and at the place that it has with one process; stand-ins come behind."""
    [alone] = shares(size, 8, 1, seed)
    ranks = shares(size, 8, world_size, seed)
    assert {len(rank) for rank in ranks} == {len(alone)}
    for number, (whole, *parts) in enumerate(zip(alone, *ranks, strict=True)):
        together = [rank.share(number) for rank in ranks]
        assert {(share.start, share.total) for share in together} == {(alone.share(number).start, len(whole))}
        for rank, (share, part) in enumerate(zip(together, parts, strict=True)):
            assert part[: share.local] == whole[rank::world_size]
            assert len(part) >= (1 if seed is None else min(2, len(whole)))  # a forward pass, and BatchNorm, need some
            assert len(part) == max(share.local, 1 if seed is None else min(2, len(whole)))
            assert set(part) <= set(whole)
    assert Counter(index for batch in alone for _, index in batch) == Counter(range(size))


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
def test_training_repeats_to_the_bit_with_any_number_of_workers_and_any_cache(tmp_path: Path, transform: str) -> None:
    make_folder(tmp_path / "images", count=12)
    image_set = load("folder", path=str(tmp_path / "images"))
    straight = epochs(module(image_set, transform), range(4))
    for mode in ("ram", "memmap"):
        for workers in (0, 2):
            kept = module(image_set, transform, mode=mode, cache=tmp_path / "cache", workers=workers)
            assert isinstance(kept.datasets["train"].store, PixelStore)
            assert_same(straight, epochs(kept, range(4)))
            assert_same(list(module(image_set, transform).test_dataloader()), list(kept.test_dataloader()))
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
        augment = Augmentation(SPEC)
        expected = augment.crop(
            augment.geometry(torch.from_numpy(image_set.splits[split].images[3]).permute(2, 0, 1)), ()
        )
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


@pytest.mark.parametrize(("device", "decoded", "expected"), [("cpu", True, 0), ("cpu", False, 4), ("cuda", True, 4), ("cuda", False, 12)])  # fmt: skip # noqa: E501
def test_workers_are_chosen_by_device_and_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, decoded: bool, expected: int
) -> None:
    monkeypatch.setattr("recast_exp.data.datamodule.usable_cores", lambda: 12)
    monkeypatch.setattr(ImageDataModule, "_device", lambda self: device)
    image_set = load("folder", path=str(make_folder(tmp_path / "images")))
    data = module(image_set, workers=None, mode="memmap" if decoded else "off", cache=tmp_path, pin_memory=False)
    loader = data.train_dataloader()
    assert loader.num_workers == expected
    assert loader.prefetch_factor == (None if not expected else 2 if device == "cpu" else 4)
    assert module(image_set, workers=3, prefetch_factor=7).train_dataloader().num_workers == 3
    assert module(image_set, workers=3, prefetch_factor=7).train_dataloader().prefetch_factor == 7


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


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_altering_on_the_device_gives_the_same_images(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(digits(), transform)
    here = epochs(data, range(2))
    normalised = [data.on_after_batch_transfer(batch, 0) for batch in here]
    monkeypatch.setattr(ImageDataModule, "_device", lambda self: "cuda")
    there = epochs(module(digits(), transform, pin_memory=False), range(2))
    assert {len(batch) for batch in there} == {2 if transform == "none" else 3}
    assert_same(normalised, [data.on_after_batch_transfer(batch, 0) for batch in there])
    monkeypatch.setattr(ImageDataModule, "_device", lambda self: "mps")  # where the loader does all of it
    assert_same(here, epochs(module(digits(), transform), range(2)))


def test_the_example_is_the_first_training_batch() -> None:
    data = module(digits(), "authors", batch_size=32)
    images, labels = data.example(32)
    assert_same([(images, labels)], epochs(data, range(1))[:1])


# Stores

GEOMETRY = Geometry(20, False, "bicubic")


def wanted(paths: list[Path], geometry: Geometry = GEOMETRY, *, build: bool = True) -> Any:
    return {"train": Request(Samples(tuple(paths), np.zeros(len(paths), dtype=np.int64)), geometry, build)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    make_cub(tmp_path)
    return sorted((tmp_path / "CUB_200_2011" / "images").rglob("*.jpg"))


def folders(cache: Path) -> set[str]:
    return {path.name for path in (cache / "images").iterdir() if path.is_dir() and path.name != "hashes"}


@pytest.mark.parametrize("mode", MODES)
def test_stores_hold_the_resized_images(tmp_path: Path, files: list[Path], mode: str) -> None:
    store = open_stores(wanted(files), mode, tmp_path / "cache", "cub")["train"]
    assert isinstance(store, FileStore if mode == "off" else PixelStore)
    assert len(store) == len(files) == 18
    for index, path in enumerate(files):
        assert torch.equal(store[index], GEOMETRY(read_image(path)))


def test_a_store_is_found_again_by_content(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = tmp_path / "cache"
    monkeypatch.setattr(store_module.time, "time_ns", lambda: 2**62)  # long after the files were written
    first = open_stores(wanted(files), "memmap", cache, "cub")["train"]
    assert "Decoding 18 images of cub, once" in caplog.text
    moved = shutil.copytree(tmp_path / "CUB_200_2011", tmp_path / "elsewhere")
    copies = sorted(moved.rglob("*.jpg"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "read_image", None)  # nothing is decoded any more
        for again in (files, copies):
            store = open_stores(wanted(again), "memmap", cache, "cub")["train"]
            assert torch.equal(store[3], first[3])
        patch.setattr(store_module, "_file_hash", None)  # nor read
        open_stores(wanted(files), "memmap", cache, "cub")
    assert len(folders(cache)) == 1
    files[3].write_bytes(files[4].read_bytes())  # other content
    changed = open_stores(wanted(files), "memmap", cache, "cub")["train"]
    assert torch.equal(changed[3], first[4])
    open_stores(wanted(files, Geometry(24, False, "bicubic")), "memmap", cache, "cub")
    open_stores(wanted(files[:5]), "memmap", cache, "cub")
    assert len(folders(cache)) == 4


def test_content_hash_follows_the_bytes_not_the_place(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module.time, "time_ns", lambda: 2**62)
    before = content_hash(files, tmp_path)
    assert before == content_hash(files, tmp_path)
    assert before != content_hash(files[::-1], tmp_path)
    data = bytearray(files[0].read_bytes())
    data[-20] ^= 1
    status = files[0].stat()
    files[0].write_bytes(data)
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time, as unpacking can leave
    assert before != content_hash(files, tmp_path)
    data[-20] ^= 1
    files[0].write_bytes(data)
    assert before == content_hash(files, tmp_path)


def test_without_build_only_what_is_kept_is_used(tmp_path: Path, files: list[Path]) -> None:
    def kind(mode: str) -> type:
        return type(open_stores(wanted(files, build=False), mode, tmp_path / "cache", "cub")["train"])

    assert kind("memmap") is kind("ram") is FileStore
    open_stores(wanted(files), "memmap", tmp_path / "cache", "cub")
    assert kind("memmap") is PixelStore
    assert kind("off") is FileStore


@pytest.mark.parametrize("damage", ["pixels.bin", "index.safetensors"])
def test_a_damaged_store_is_built_again(tmp_path: Path, files: list[Path], damage: str) -> None:
    cache = tmp_path / "cache"
    first = open_stores(wanted(files), "memmap", cache, "cub")["train"][7].clone()
    (folder,) = folders(cache)
    path = cache / "images" / folder / damage
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(open_stores(wanted(files), "memmap", cache, "cub")["train"][7], first)


@pytest.mark.parametrize(
    "shapes",
    [
        torch.ones(0, 2, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
        torch.tensor(3),
        torch.ones(12, 3, dtype=torch.int64),
        torch.ones(12, 2),
        torch.ones(12, 2, dtype=torch.bfloat16),
        -torch.ones(12, 2, dtype=torch.int64),
        "a folder",
        "a pipe",
    ],
)
def test_an_index_that_cannot_be_is_built_again(tmp_path: Path, files: list[Path], shapes: Tensor | str) -> None:
    cache = tmp_path / "cache"
    first = open_stores(wanted(files), "memmap", cache, "cub")["train"][7].clone()
    [index] = cache.rglob("index.safetensors")
    if isinstance(shapes, Tensor):
        save_file({"shapes": shapes}, index)
    else:
        index.unlink()
        (index.mkdir if shapes == "a folder" else lambda: os.mkfifo(index))()
    assert torch.equal(open_stores(wanted(files), "memmap", cache, "cub")["train"][7], first)


@pytest.mark.parametrize("mode", ["ram", "memmap"])
def test_a_damaged_image_leaves_nothing_behind(tmp_path: Path, files: list[Path], mode: str) -> None:
    files[9].write_bytes(files[9].read_bytes()[:-300])
    with pytest.raises(RecastError) as error:
        open_stores(wanted(files), mode, tmp_path / "cache", "cub")
    assert_one_line(error, files[9], "cannot be read as an image", "dataset.bad_images=skip")
    if mode == "memmap":
        assert folders(tmp_path / "cache") == set()


def test_what_does_not_fit_is_refused_first(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**28 + 1000)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(store_module, "_free_memory", lambda: 2**28 + 1000)
    for mode, other in (("memmap", "set cache_dir elsewhere"), ("ram", "set dataset.cache=memmap")):
        with pytest.raises(RecastError) as error:
            open_stores(wanted(files), mode, tmp_path / "cache", "cub")
        assert_one_line(error, f"dataset.cache: {mode} needs 0 MB", "18 images of cub", other, "dataset.cache=off")
    assert not list((tmp_path / "cache").glob("images/*/*.bin"))


BUILD = """
import os, sys, time
from pathlib import Path
import numpy as np
import recast_exp.data.store as store
from recast_exp.data.types import Samples
from recast_exp.data.preprocessing import Geometry
paths = tuple(sorted(Path(sys.argv[1]).rglob("*.jpg")))
read = store.read_image
def slow(path, decoding):
    os.write(1, b"decoding\\n")  # in one piece, whatever the other threads write
    time.sleep(float(sys.argv[3]))
    return read(path, decoding)
store.read_image = slow
request = store.Request(Samples(paths, np.zeros(len(paths), dtype=np.int64)), Geometry(20, False, "bicubic"))
found = store.open_stores({"train": request}, "memmap", Path(sys.argv[2]), "cub")["train"]
print("sum", sum(int(found[i].sum()) for i in range(len(found))))
"""


def start_build(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    code = [sys.executable, "-c", BUILD, str(tmp_path / "CUB_200_2011"), str(tmp_path / "cache"), str(seconds)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_store_and_is_cleaned_up(tmp_path: Path, files: list[Path]) -> None:
    process = start_build(tmp_path, 0.5)
    assert process.stdout is not None
    assert process.stdout.readline() == "decoding\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = folders(tmp_path / "cache")
    assert ".tmp" in left
    store = open_stores(wanted(files), "memmap", tmp_path / "cache", "cub")["train"]
    assert len(store) == 18
    (folder,) = folders(tmp_path / "cache")
    assert left.startswith(folder)
    assert left != folder


def test_a_place_that_cannot_be_written_to(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "images").write_text("a file where a folder should be")
    with pytest.raises(RecastError) as error:
        open_stores(wanted(files), "memmap", tmp_path / "cache", "cub")
    assert_one_line(error, f"dataset.cache: {tmp_path / 'cache' / 'images'} cannot be written to", "dataset.cache=off")


def test_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(RecastError) as error:
        read_image(tmp_path / "float.tiff")
    assert_one_line(error, "float.tiff", "32 bits per pixel, mode F")


def test_two_jobs_build_one_store(tmp_path: Path, files: list[Path]) -> None:
    processes = [start_build(tmp_path, 0.1) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert outputs[0][-1] == outputs[1][-1]
    assert outputs[0][-1].startswith("sum ")
    assert sorted(output.count("decoding") for output in outputs) == [0, 18]
    assert len(folders(tmp_path / "cache")) == 1


def test_arrays_are_kept_resized_only_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    image_set = digits()
    small = module(image_set).datasets["test"].store
    assert isinstance(small, PixelStore)
    monkeypatch.setattr(store_module, "SMALL", 1000)
    large = module(image_set).datasets["test"].store
    assert isinstance(large, ArrayStore)
    assert all(torch.equal(small[i], large[i]) for i in range(len(small)))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not say")
@pytest.mark.parametrize("mode", ["off", "memmap"])
def test_loader_processes_do_not_grow(tmp_path: Path, mode: str) -> None:
    """Their private memory, after the first epoch, with many more images than are looked at twice by chance."""
    image_set = load("folder", path=str(make_folder(tmp_path / "images", count=60)))
    data = module(image_set, "light", workers=1, mode=mode, cache=tmp_path / "cache")
    loader = data.train_dataloader()
    sizes = []
    # A collection in the worker would copy, page by page, what other tests have left in this process
    gc.collect()
    gc.freeze()
    for epoch in range(12):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for _ in loader:
            pass
        (worker,) = loader._iterator._workers
        lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
        sizes.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private")))
    gc.unfreeze()
    assert max(sizes[4:]) - sizes[3] < 2000  # kB


@pytest.mark.slow
def test_loader_processes_start_within_those_of_joblib() -> None:
    """joblib's processes start others by "loky", which takes none but its own."""
    pytest.importorskip("joblib")
    code = (
        "import joblib.externals.loky, multiprocessing, numpy as np\n"
        "multiprocessing.set_start_method('loky', force=True)\n"
        "from recast_exp.data.datamodule import ImageDataModule\n"
        "from recast_exp.data.preprocessing import InputSpec\n"
        "from recast_exp.data.types import ImageSet, Samples\n"
        "samples = Samples(np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 2)\n"
        "images = ImageSet('six', ('a', 'b'), dict.fromkeys(('train', 'val', 'test'), samples))\n"
        "spec = InputSpec(8, (0.5,) * 3, (0.5,) * 3, 1.0, 'bilinear')\n"
        "data = ImageDataModule(images, spec, 'none', 2, 2, 0, num_workers=1)\n"
        "print(sum(len(labels) for _, labels in data.test_dataloader()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
