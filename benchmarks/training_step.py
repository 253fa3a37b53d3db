"""One optimisation step of RECAST on ViT-S/16 against full fine-tuning of stock timm.

Forward, loss, backward and AdamW, 224 px, float32. Target: vit_att takes at most 0.80 of full fine-tuning's time.

The arithmetic's limit counts the multiplications that no implementation can leave out: every layer's forward, the
gradient of a layer's input where something trained lies before it, and the gradient of its weight where that is
trained (coefficients need their weight's whole gradient). It is the limit as far as the matrix products set the time;
layer norms, GELU and softmax cost both sides nearly the same, AdamW costs full fine-tuning more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from measuring import arguments, interleaved, report, use_threads, verdict
from models import CLASSES, batch, frozen, recast, stock

TARGET = 0.80
FULL = "full fine-tuning"


def make_step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[], None]:
    """A step of AdamW on what trains in a model; `forward`, where it is given, computes the logits in its place."""
    forward = forward or model
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step


def necessary(
    trained: frozenset[str],
    *,
    last_blocks: int | None = None,
    kept: bool = False,
    depth: int = 12,
    width: int = 384,
    tokens: int = 197,
) -> dict[str, float]:
    """GFLOPs of one image's step, by part, that arithmetic asks for.

    Args:
        trained: The weights that train, of patch_embed, qkv, proj, fc1, fc2; the head always does.
        last_blocks: How many blocks they train in, from the end; None for all.
        kept: Whether what goes into the first of these blocks is known.
        depth: Blocks.
        width: Width of the model.
        tokens: Patches and class token.
    """
    linear = 2 * tokens * width * width  # FLOPs of a width x width layer
    attention = 2 * 2 * tokens * tokens * width  # QKᵀ and PV
    block = [("qkv", 3 * linear), ("attention", attention), ("proj", linear), ("fc1", 4 * linear), ("fc2", 4 * linear)]
    layers = [("patch_embed", 2 * (tokens - 1) * 16 * 16 * 3 * width), *block * depth, ("head", 2 * width * CLASSES)]
    parts = {"forward": 0.0, "input gradients": 0.0, "weight gradients": 0.0}
    before = False  # whether anything trained lies before the layer, so that its input needs a gradient
    start = len(layers) - 1 - len(block) * (depth if last_blocks is None else last_blocks)
    for number, (name, flops) in enumerate(layers):
        early = last_blocks is not None and number < start
        parts["forward"] += 0 if early and kept else flops / 1e9
        if before:  # attention has two inputs for each of its products
            parts["input gradients"] += (2 if name == "attention" else 1) * flops / 1e9
        if (name in trained and not early) or name == "head":
            parts["weight gradients"] += flops / 1e9
            before = True
    return parts


def counted(step: Callable[[], None]) -> float:
    """GFLOPs that torch counts in one step (its attention backward computes QKᵀ once more)."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = arguments(__doc__, rounds=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="show where vit_att's time goes instead")
    args = parser.parse_args()
    use_threads(args.threads)
    images, labels = batch(args.batch_size)

    if args.profile:
        step = make_step(recast("vit_att"), images, labels)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(args.rounds):
                step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        return

    trained = {
        FULL: frozenset({"patch_embed", "qkv", "proj", "fc1", "fc2"}),
        "vit_att": frozenset({"qkv"}),
        "vit_mlp": frozenset({"fc1", "fc2"}),
        "vit_att_mlp": frozenset({"qkv", "fc1", "fc2"}),
        "frozen": frozenset[str](),
    }
    models = {FULL: stock(), "frozen": frozen()} | {name: recast(name) for name in trained if name.startswith("vit_")}
    steps = {name: make_step(models[name], images, labels) for name in trained}
    parts = {name: necessary(weights) for name, weights in trained.items()}
    needed = {name: sum(part.values()) for name, part in parts.items()}
    limits = {name: total / needed[FULL] for name, total in needed.items()}
    flops = {name: counted(step) / args.batch_size for name, step in steps.items()}
    times = interleaved(steps, rounds=args.rounds)

    measured = times.ratio("vit_att", FULL)
    for name, part in parts.items():
        print(
            f"{name:17}{' + '.join(f'{value:5.2f} {what}' for what, value in part.items())}"
            f" = {needed[name]:5.2f} GFLOPs per image, {limits[name]:.3f} of {FULL}'s"
        )
    report(
        "training_step",
        times,
        FULL,
        columns={
            "limit": {name: f"{limit:.3f}" for name, limit in limits.items()},
            "GFLOPs/image": {name: f"{value:.2f}" for name, value in flops.items()},
            "counted": {name: f"{value / flops[FULL]:.3f}" for name, value in flops.items()},
        },
        notes=[
            verdict(f"vit_att {measured.median:.3f}, target at most {TARGET:.2f}", measured, at_most=TARGET),
            f"vit_att is {measured.median - limits['vit_att']:+.3f} from the limit {limits['vit_att']:.3f}; "
            f"{(1 - measured.median) / (1 - limits['vit_att']):.0%} of the saving that it allows are reached",
        ],
        extra={"batch_size": args.batch_size, "limits": limits, "needed": parts, "counted_gflops_per_image": flops},
        path=args.json,
    )


if __name__ == "__main__":
    main()
