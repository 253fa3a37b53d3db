"""Images per second that one core loads, augments and normalises, against the authors' pipeline and torchvision's.

Photographs of 500 x 375 pixels, JPEG; out comes a normalised float32 batch at 224 px. All cases run on one thread in
this process. `authors' code` is PIL, ToTensor, resize, flip, jitter, affine, normalise, on floats, as RECAST's authors
have it; `torchvision` is PIL, RandomResizedCrop, flip, ToTensor, normalise. Ours are named TRANSFORM, CACHE. Targets:
light, memmap is at least 20 times as fast as the authors' code and 3 times as fast as torchvision; authors, memmap at
least 3 times as fast as the authors' code, for the same augmentation.

The photographs are pieces of the two that scikit-learn brings; --images FOLDER takes others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from measuring import Figure, Report, Spread, arguments, interleaved, write
from recast_exp.data.datamodule import ImageDataModule, requests
from recast_exp.data.images import read_image
from recast_exp.data.loader import EpochSampler
from recast_exp.data.pixels import ORDERS, affine, flip, jitter
from recast_exp.data.preprocessing import InputSpec
from recast_exp.data.store import PixelStore, open_stores
from recast_exp.data.transforms import augmentation
from recast_exp.data.types import SPLITS, ImageSet, Samples

SPEC = InputSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.9, "bicubic")
AUTHORS, TORCHVISION = "authors' code", "torchvision"
OURS = (("light", "memmap"), ("standard", "memmap"), ("authors", "memmap"), ("light", "off"), ("authors", "off"))
TARGETS = ((AUTHORS, "light, memmap", 20.0), (TORCHVISION, "light, memmap", 3.0), (AUTHORS, "authors, memmap", 3.0))


def photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> list[Path]:
    """Write pieces of scikit-learn's photographs, each another one."""
    random, photos = np.random.RandomState(0), load_sample_images().images
    paths = []
    for number in range(count):
        photo = Image.fromarray(photos[number % 2])
        left, top = (random.randint(full - part + 1) for full, part in zip(photo.size, size, strict=True))
        paths.append(folder / f"{number}.jpg")
        photo.crop((left, top, left + size[0], top + size[1])).save(paths[-1], quality=90)
    return paths


def reference(name: str) -> Callable[[Image.Image], Tensor]:
    normalize = v1.Normalize(SPEC.mean, SPEC.std)
    if name == AUTHORS:
        return v1.Compose(
            [
                v1.ToTensor(),
                v1.Resize((224, 224)),
                v1.RandomHorizontalFlip(),
                v1.ColorJitter(0.4, 0.4, 0.4, 0.2),
                v1.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
                normalize,
            ]
        )
    return v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip(), v1.ToTensor(), normalize])


def reference_pass(name: str, paths: Sequence[Path], batch_size: int) -> Callable[[], None]:
    transform = reference(name)

    def run() -> None:
        for start in range(0, len(paths), batch_size):
            images = []
            for path in paths[start : start + batch_size]:
                with Image.open(path) as image:
                    images.append(transform(image.convert("RGB")))
            torch.stack(images)

    return run


def data_module(paths: Sequence[Path], transform: str, mode: str, cache: Path, **options: int) -> ImageDataModule:
    samples = Samples(tuple(paths), np.zeros(len(paths), dtype=np.int64))
    image_set = ImageSet("photographs", ("photograph",), dict.fromkeys(SPLITS, samples))
    wanted = {"train": requests(image_set, SPEC, transform, build=True)["train"]}
    stores = dict.fromkeys(SPLITS, open_stores(wanted, mode, cache, image_set.name)["train"])
    return ImageDataModule(image_set, SPEC, transform, 64, 64, seed=0, stores=stores, **options)


def our_pass(data: ImageDataModule) -> Callable[[], None]:
    loader = data.train_dataloader()

    def run() -> None:
        for batch in loader:
            data.on_after_batch_transfer(batch, 0)

    return run


def steps(path: Path, cache: Path) -> dict[str, float]:
    """Milliseconds of one image's steps, the best of several."""
    pixels = read_image(path)
    light, authors, standard = (augmentation(name, SPEC) for name in ("light", "authors", "standard"))
    kept = light.geometry(pixels)
    store = data_module([path], "light", "memmap", cache).datasets["train"].store
    place = torch.empty(1, 3, 224, 224, dtype=torch.uint8)
    image = authors.geometry(pixels)[None]
    numbers = torch.rand(1, standard.draws)
    neutral = [torch.ones(1)] * 3 + [torch.zeros(1)]
    one = torch.ones(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    work: dict[str, Callable[[], object]] = {
        "decode": lambda: read_image(path),
        "resize": lambda: light.geometry(pixels),
        "read and crop": lambda: place[0].copy_(light.crop(store[0], ())),
        "random resized crop": lambda: standard.crop(kept, numbers[0].tolist()),
        "flip": lambda: flip(place, one.bool()),
        "colour jitter": lambda: jitter(image, neutral, torch.tensor([len(ORDERS) - 1])),
        "affine": lambda: affine(image, 5 * one, torch.ones(1, 2), 1.05 * one),
        "normalise": lambda: place.float().div_(255).sub_(mean).div_(std),
        "torchvision's jitter": lambda: v2.ColorJitter((1.2, 1.2), (1.2, 1.2), (1.2, 1.2), (0.1, 0.1))(image),
        "torchvision's affine": lambda: v2.functional.affine(image, 5, [1, 1], 1.05, [0.0, 0.0]),
    }
    found = {}
    for name, run in work.items():
        seconds = []
        for _ in range(15):
            start = time.process_time()
            for _ in range(4):
                run()
            seconds.append((time.process_time() - start) / 4)
        found[name] = 1e3 * min(seconds)
    return found


def memory(paths: Sequence[Path], cache: Path, epochs: int) -> list[float]:
    """Private memory of a loader process after each epoch, in MB."""
    loader = data_module(paths, "authors", "memmap", cache, num_workers=1).train_dataloader()
    sizes = []
    for epoch in range(epochs):
        sampler = loader.batch_sampler.sampler
        assert isinstance(sampler, EpochSampler)
        sampler.set_epoch(epoch)
        for _ in loader:
            pass
        lines = Path(f"/proc/{loader._iterator._workers[0].pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        sizes.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1e3)
    return sizes


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--images", type=Path, help="folder of JPEG files to use instead")
    parser.add_argument("--count", type=int, default=128, help="photographs of a pass (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = sorted(args.images.rglob("*.jpg"))[: args.count] if args.images else photographs(folder, args.count)
        cases = {case: reference_pass(case, paths, 64) for case in (AUTHORS, TORCHVISION)}
        for transform, mode in OURS:
            data = data_module(paths, transform, mode, folder, num_workers=0)
            assert isinstance(data.datasets["train"].store, PixelStore) == (mode != "off")
            cases[f"{transform}, {mode}"] = our_pass(data)
        times = interleaved(cases, rounds=args.rounds)
        parts = steps(paths[0], folder)
        sizes = memory(paths, folder, 8) if Path("/proc/self/smaps_rollup").exists() else []
    rate = {case: f"{len(paths) / times.spread(case).median:,.0f}" for case in cases}
    faster = {
        (slow, fast): Spread.of([a / b for a, b in zip(times.processor[slow], times.processor[fast], strict=True)])
        for slow, fast, _ in TARGETS
    }
    part = Report(
        "input pipeline",
        times,
        AUTHORS,
        [
            Figure(f"input pipeline: {slow} / {fast}, processor", faster[slow, fast], at_least=target)
            for slow, fast, target in TARGETS
        ],
        columns={"images/s": rate},
        notes=[
            "milliseconds of one image on one core: " + ", ".join(f"{step} {each:.3f}" for step, each in parts.items()),
            *(
                [
                    f"private memory of a loader process after epochs 1 to {len(sizes)}: "
                    + " ".join(f"{size:.1f}" for size in sizes)
                    + f" MB; the last half differs by {max(sizes[4:]) - min(sizes[4:]):.1f}"
                ]
                if sizes
                else []
            ),
        ],
        extra={"images": len(paths), "milliseconds": parts, "memory_mb": sizes},
    ).show()
    write(args.json, "input_pipeline", part)


if __name__ == "__main__":
    main()
