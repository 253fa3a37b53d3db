"""An epoch of a real run against the same number of bare steps: what the loop, the images and the validation add.

`fit` trains `vit_att` on photographs from a folder, through the cache of resized images, Lightning's loop and the
loader; the bare steps compute the same loss on one batch that is there already. The photographs are those of
`input_pipeline.py`. An epoch is the difference of a fit of two epochs and one of one epoch, so the start of `fit` does
not count. Target: 1.10.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from gradients import configured
from heads import make_step
from input_pipeline import photographs
from measuring import Figure, Report, Times, arguments, interleaved, use_threads, write
from recast_exp.config.schema import Config
from recast_exp.experiment.experiment import Experiment
from recast_exp.training.loop import fit
from recast_exp.training.trainer import progress_bars, quiet

TARGET = 1.10
ONE, TWO, STEPS, EPOCH = "fit, one epoch", "fit, two epochs", "bare steps", "an epoch"


def settings(folder: Path, images: int, size: int, batch_size: int, more: list[str]) -> Config:
    """Those of a run on the photographs, of which a few are for validation and test."""
    per_class = {"train": images // 2, "val": 2, "test": 1}
    for split, count in per_class.items():
        for name in ("china", "flower"):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            photographs(place, count)
    return configured(
        [
            *("dataset=folder", f"dataset.path={folder / 'images'}", f"dataset.batch_size={batch_size}"),
            *("model=vit_att", "model.backbone=vit_small_patch16_224", "model.pretrained=false"),
            *(f"model.img_size={size}", "training=joint", "probe=false", f"cache_dir={folder / 'cache'}", *more),
        ]
    )


class Fits:
    """Fits of one model; each goes on where the one before ended, which takes the same time."""

    def __init__(self, given: Config) -> None:
        self.experiment = Experiment.open(given)
        self.adapted = self.experiment.adapt(self.experiment.banks()[0])
        self.data = self.experiment.data(keep=True)

    def run(self, epochs: int) -> None:
        """Train for some epochs."""
        self.experiment.recipe.trainer.max_epochs = epochs
        fit(self.experiment.recipe, self.adapted, self.data)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=128, help="photographs of an epoch (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("overrides", nargs="*", help="as for recast_exp: trainer.precision=bf16-mixed")
    args = parser.parse_args()
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, progress_bars(False), quiet():
        folder = Path(name)
        where = "cpu" if args.device == "cpu" else "gpu"
        more = [f"trainer.accelerator={where}", *args.overrides]
        given = settings(folder, args.images, args.img_size, args.batch_size, more)
        fits = Fits(given)
        step = make_step(given, args.batch_size, folder / "cache", args.device)
        count = -(-args.images // args.batch_size)

        def steps() -> None:
            for _ in range(count):
                step()

        times = interleaved({STEPS: steps, ONE: lambda: fits.run(1), TWO: lambda: fits.run(2)}, rounds=args.rounds)

    def with_epoch(parts: dict[str, list[float]]) -> dict[str, list[float]]:
        return {**parts, EPOCH: (np.array(parts[TWO]) - np.array(parts[ONE])).tolist()}

    times = Times(with_epoch(times.seconds), with_epoch(times.processor))
    part = Report(
        f"epoch ({args.device}, {given.trainer.precision}, {args.images} photographs at {args.img_size} px, "
        f"batch {args.batch_size})",
        times,
        STEPS,
        [Figure(f"epoch / {STEPS}", times.ratio(EPOCH, STEPS), at_most=TARGET, limit=1)],
        columns={"images/s": {case: f"{args.images / times.spread(case).median:,.0f}" for case in (STEPS, EPOCH)}},
    ).show()
    write(args.json, "epoch", part)


if __name__ == "__main__":
    main()
