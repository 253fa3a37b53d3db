"""One optimisation step of the last blocks' coefficients on ViT-S/16, with and without kept activations.

Forward, loss, backward and AdamW, 224 px, float32, beside full fine-tuning of stock timm in the same process. Without
kept activations, the blocks before the first that trains run forward; with them (`trainer.activations_mb`), a step
starts at that block. Targets: the last six blocks' MLPs take at most 0.63 of full fine-tuning's time without, and 0.46
with kept activations. The limits are those of `training_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from measuring import Figure, Report, arguments, interleaved, use_threads, write
from models import batch, recast, stock
from recast_exp.models.resume import find
from training_step import FULL, make_step, necessary

WEIGHTS = {"vit_mlp": frozenset({"fc1", "fc2"}), "vit_att": frozenset({"qkv"})}
AIMED = {"vit_mlp 6": 0.63, "vit_mlp 6, kept": 0.46}


def kept_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """As `make_step`, from activations that are computed here."""
    size = images.shape[-1]
    found = find(model, size)
    assert found is not None
    return make_step(model, found.before(images), labels, partial(found.after, size=size))


def main() -> None:
    parser = arguments(__doc__, rounds=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 6, 9, 12], help="numbers of last blocks")
    args = parser.parse_args()
    use_threads(args.threads)
    images, labels = batch(args.batch_size)

    steps = {FULL: make_step(stock(), images, labels)}
    full = sum(necessary(frozenset({"patch_embed", "qkv", "proj", "fc1", "fc2"})).values())
    limits = {FULL: 1.0}
    for name, weights in WEIGHTS.items():
        for blocks in args.blocks:
            case = f"{name} {blocks}"
            steps[case] = make_step(recast(name, blocks), images, labels)
            limits[case] = sum(necessary(weights, last_blocks=blocks).values()) / full
            if blocks < 12:  # all blocks start at the first
                steps[f"{case}, kept"] = kept_step(recast(name, blocks), images, labels)
                limits[f"{case}, kept"] = sum(necessary(weights, last_blocks=blocks, kept=True).values()) / full
    times = interleaved(steps, rounds=args.rounds)
    part = Report(
        f"last blocks (batch {args.batch_size})",
        times,
        FULL,
        [
            Figure(f"step: last blocks, {case} / {FULL}", times.ratio(case, FULL), at_most=AIMED.get(case), limit=limit)
            for case, limit in limits.items()
            if case != FULL
        ],
        columns={"limit": {case: f"{limit:.3f}" for case, limit in limits.items()}},
        extra={"batch_size": args.batch_size, "limits": limits},
    ).show()
    write(args.json, "last_blocks", part)


if __name__ == "__main__":
    main()
