"""Solved heads: the solved probe beside the trained one, each head by itself, and a training step through a head.

probe: a linear probe for a frozen backbone, with the images decoded and resized already. The solved one is the best of
all solved heads, with all their strengths. Its time is split into the forward pass (the features of all images) and
the solving (solve, choose, measure). The trained one is model=vit_frozen training=joint head=linear with the recipe of
the overrides, and its test. Targets, for ten kinds of birds: solving takes at most 2 s, and the trained probe at least
20 times as long as solving. How many times as long as the whole solved probe it takes depends on how many times as many
images it sends through the backbone: the training and validation images in each epoch.

heads: `solve` of each head for all its strengths, on synthetic features. Each computes the sums over images that heads
share by itself. --large adds larger sets of features (minutes).

step: a step of training=through_head beside one of training=joint, on the same batch and model (vit_att).

Everything runs on the CPU. The forward pass and all training use `trainer.num_threads` threads, as in a run.

Example: python benchmarks/heads.py experiment=real_mini_joint dataset=cub data_dir=DIR model.weights=FILE
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from gradients import configured
from measuring import Figure, Report, Times, arguments, interleaved, peak_memory, use_threads, write
from recast_exp import heads
from recast_exp.config.schema import Config
from recast_exp.data.types import SPLITS
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.features import frozen_features
from recast_exp.experiment.probe import probe
from recast_exp.heads import Features, Head
from recast_exp.torch_state import threads
from recast_exp.training.environment import thread_count
from recast_exp.training.loop import fit, test
from recast_exp.training.module import TaskModule
from recast_exp.training.trainer import progress_bars, quiet

SECONDS, SPEEDUP = 2.0, 20.0

FORWARD, SOLVE, SOLVED, TRAINED = "forward pass", "solving", "solved probe (both)", "trained probe"

Size = tuple[int, int, int]

SMALL: list[Size] = [(250, 384, 10)]  # images, features, classes
LARGE: list[Size] = [(5994, 768, 200), (50_000, 768, 10)]
HEADS = ("nearest_mean", "lda", "ridge", "logistic")

JOINT = "joint"
STEPS = {
    JOINT: ["training=joint"],
    "through_head, splits": ["training=through_head", "training.measured=splits", "training.splits=8"],
    "through_head, leave_one_out": ["training=through_head", "training.measured=leave_one_out"],
}


class Probes:
    """The solved probe and the trained one, on one backbone and with the same images.

    Args:
        settings: Those of the trained probe.
        folder: An empty folder for resized images and results, instead of the user's cache.
    """

    def __init__(self, settings: Config, folder: Path) -> None:
        self.experiment = Experiment.open(settings)
        self.experiment.cache = folder
        self.experiment.data(keep=True, plain=True)  # decodes and resizes
        self.accuracy: dict[str, float] = {}
        self.passed: dict[str, int] = {}  # images through the backbone
        self._case = FORWARD
        self.experiment.backbone.network.register_forward_pre_hook(self._count)

    def forward(self) -> None:
        """The features of all images, computed anew."""
        self._begin(FORWARD)
        shutil.rmtree(self.experiment.cache / "features", ignore_errors=True)
        for split in SPLITS:
            frozen_features(self.experiment, split)

    def solve(self) -> None:
        """The rest of the solved probe, with the features at hand."""
        shutil.rmtree(self.experiment.cache / "probes", ignore_errors=True)
        self.accuracy[SOLVED] = float(probe(self.experiment)["test/accuracy"])

    def train(self) -> None:
        """The trained probe, with a new head."""
        self._begin(TRAINED)
        experiment = self.experiment
        adapted, data = experiment.adapt(None), experiment.data(keep=True)
        fit(experiment.recipe, adapted, data)
        self.accuracy[TRAINED] = test(experiment.recipe, adapted, data).metrics["test/accuracy"]

    def _begin(self, case: str) -> None:
        self._case, self.passed[case] = case, 0

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.passed[self._case] += len(inputs[0])


def probe_times(probes: Probes, rounds: int) -> Times:
    """The times of the parts, and of the solved probe as a whole."""
    probes.forward()
    probes.solve()  # an untimed round; Lightning's first start and imports are behind, so the trained probe needs none
    cases = {FORWARD: probes.forward, SOLVE: probes.solve, TRAINED: probes.train}
    times = interleaved(cases, rounds=rounds, warmup=0)

    def whole(parts: dict[str, list[float]]) -> dict[str, list[float]]:
        both = [forward + solve for forward, solve in zip(parts[FORWARD], parts[SOLVE], strict=True)]
        return {FORWARD: parts[FORWARD], SOLVE: parts[SOLVE], SOLVED: both, TRAINED: parts[TRAINED]}

    return Times(whole(times.seconds), whole(times.processor))


def measure_probe(overrides: Sequence[str], rounds: int) -> Report:
    settings = configured([*overrides, "model=vit_frozen", "training=joint", "head=linear"])
    with tempfile.TemporaryDirectory() as folder:
        probes = Probes(settings, Path(folder))
        times = probe_times(probes, rounds)
    images = {split: len(probes.experiment.images.splits[split].labels) for split in SPLITS}
    seconds = times.spread(SOLVE)
    beyond, whole = times.ratio(TRAINED, SOLVE), times.ratio(TRAINED, SOLVED)
    epochs, passed = settings.trainer.max_epochs, probes.passed
    more = passed[TRAINED] / passed[FORWARD]
    return Report(
        "heads: probe",
        times,
        SOLVED,
        [
            Figure("probe: solving, beyond the forward pass", seconds, "s", at_most=SECONDS),
            Figure("probe: trained / solving", beyond, at_least=SPEEDUP),
            Figure("probe: trained / forward pass and solving", whole),
        ],
        columns={"test accuracy": {name: f"{value:.3f}" for name, value in probes.accuracy.items()}},
        notes=[
            f"dataset={settings.dataset.name}, {settings.model.backbone}: "
            + ", ".join(f"{count} {split}" for split, count in images.items())
            + f" images; {epochs} epochs, batches of {settings.dataset.batch_size}",
            f"the trained probe sends {more:.1f} times as many images through the backbone ({passed[TRAINED]:,} and "
            f"{passed[FORWARD]:,})",
        ],
        extra={
            "dataset": settings.dataset.name,
            "images": images,
            "epochs": epochs,
            "passed": passed,
            "accuracy": probes.accuracy,
        },
    )


def synthetic(size: Size) -> Features:
    """Normal features whose variance falls along the dimensions, and the distances of class means faster."""
    images, width, classes = size
    generator = torch.Generator().manual_seed(0)
    scale = (1 + torch.arange(width) / 10).rsqrt()
    means = scale.square() * torch.randn(classes, width, generator=generator)
    labels = torch.arange(images) % classes
    return Features(means[labels] + scale * torch.randn(images, width, generator=generator), labels, classes)


def solver(head: Head, features: Features) -> Callable[[], None]:
    def run() -> None:
        fresh = Features(features.values, features.labels, features.num_classes)  # without the sums that it keeps
        for _ in head.solve(fresh, head.settings()):
            pass

    return run


def measure_heads(size: Size, rounds: int) -> Report:
    features = synthetic(size)
    found: dict[str, Head] = {name: heads.load(name)() for name in HEADS}
    cases = {name: solver(head, features) for name, head in found.items()}
    peaks = {name: peak_memory(run) for name, run in cases.items()}  # the untimed round
    times = interleaved(cases, rounds=rounds, warmup=0)
    images, width, classes = size
    return Report(
        f"heads: {images:,} images, {width} features, {classes} classes",
        times,
        min(cases, key=lambda name: times.spread(name).median),
        columns={
            "strengths": {name: str(len(head.settings())) for name, head in found.items()},
            "memory": {name: f"{peak:,.0f} MB" for name, peak in peaks.items() if peak is not None},
        },
        extra={"size": size, "peak_memory_mb": peaks},
    )


def make_step(settings: Config, count: int, folder: Path, device: str = "cpu") -> Callable[[], None]:
    """A step on the first training images, at most `count`: objective, backward pass, optimiser."""
    experiment = Experiment.open(settings)
    experiment.cache = folder
    adapted = experiment.adapt(experiment.banks()[0])
    adapted.set_trainable(*experiment.objective.trains)
    data = experiment.data(keep=True)
    images, labels = data.example(count)
    images, labels = data.normalize(images).to(device), labels.to(device)
    module = TaskModule(adapted, experiment.recipe, len(experiment.images.classes)).to(device)
    half = settings.trainer.precision == "bf16-mixed"
    configuration: Any = module.configure_optimizers()
    optimizer: torch.optim.Optimizer = configuration["optimizer"]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = module.objective.step(module, images, labels, 0).loss
        loss.backward()
        optimizer.step()

    return step


def measure_step(overrides: Sequence[str], count: int, rounds: int) -> Report:
    settings = {name: configured([*overrides, "model=vit_att", *more]) for name, more in STEPS.items()}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: make_step(each, count, Path(folder)) for name, each in settings.items()}
        joint = settings[JOINT]
        with threads(thread_count(joint.trainer)):
            times = interleaved(steps, rounds=rounds)
    return Report(
        "heads: step",
        times,
        JOINT,
        [Figure(f"step: {name} / {JOINT}", times.ratio(name, JOINT)) for name in STEPS if name != JOINT],
        notes=[f"dataset={joint.dataset.name}, {joint.model.backbone}, at most {count} images"],
        extra={"dataset": joint.dataset.name, "batch_size": count},
    )


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("overrides", nargs="*", help="as for recast_exp: dataset=digits")
    parser.add_argument("--parts", nargs="+", choices=["probe", "heads", "step"], default=["probe", "heads", "step"])
    parser.add_argument("--large", action="store_true", help="solve the heads on large sets of features, too")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (default: %(default)s)")
    args = parser.parse_args()
    use_threads(args.threads)
    overrides = [*args.overrides, "trainer.accelerator=cpu"]
    limits: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if args.threads:
        overrides.append(f"trainer.num_threads={args.threads}")
        limits = threadpool_limits(args.threads)  # of the libraries below scikit-learn
    work: dict[str, list[Callable[[], Report]]] = {
        "probe": [partial(measure_probe, overrides, args.rounds)],
        "heads": [partial(measure_heads, size, args.rounds) for size in SMALL + (LARGE if args.large else [])],
        "step": [partial(measure_step, overrides, args.batch_size, args.rounds)],
    }
    with progress_bars(False), quiet(), limits:
        found = [run().show() for part in args.parts for run in work[part]]
    write(args.json, "heads", *found)


if __name__ == "__main__":
    main()
