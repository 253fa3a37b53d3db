"""One optimisation step of RECAST on ViT-S/16 against full fine-tuning of stock timm: time, memory, and its limit.

Forward, loss, backward and AdamW, 224 px, float32 unless `--bf16`. Targets: vit_att takes at most 0.80 of full
fine-tuning's time and 0.75 of its memory (parameters, optimizer state, and what a step needs beyond these at its
peak).

The arithmetic's limit counts the multiplications that no implementation can leave out: every layer's forward, the
gradient of a layer's input where something trained lies before it, and the gradient of its weight where that is
trained (coefficients need their weight's whole gradient). It is the limit as far as the matrix products set the time;
layer norms, GELU and softmax cost both sides nearly the same, AdamW costs full fine-tuning more.

A large square matrix product runs in turn with the steps. The share of its speed that a step's necessary
multiplications reach is what can be compared between machines. On a GPU whose peak is known, the page also has the
share of that: the model FLOPs utilisation (MFU), with a target of 0.40 for vit_att at batch 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from measuring import Figure, Report, Spread, Times, arguments, interleaved, peak_memory, use_threads, write
from models import CLASSES, Setting, add_setting, batch, frozen, recast, stock

TARGET, MEMORY, MFU = 0.80, 0.75, 0.40
FULL, PRODUCT = "full fine-tuning", "matrix product"
WIDTH = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices."""
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
"""TFLOP/s of dense bfloat16 products with float32 sums, by NVIDIA's data sheets."""


def make_step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    setting: Setting | None = None,
) -> Callable[[], None]:
    """A step of AdamW on what trains in a model; `forward`, where it is given, computes the logits in its place."""
    setting = setting or Setting()
    compute = setting.compiled(forward or model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(compute(images), labels)
        loss.backward()
        optimizer.step()

    return step


def resident(model: nn.Module) -> float:
    """MB of a model's parameters and of AdamW's two averages of those that train."""
    numbers = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return sum(size * (3 if trains else 1) for size, trains in numbers) / 1e6


def product(setting: Setting) -> tuple[Callable[[], None], float]:
    """A large matrix product, and its GFLOPs."""
    width = WIDTH.get(setting.device, 2048)
    one, other = torch.randn(2, width, width, dtype=torch.bfloat16 if setting.bf16 else torch.float32)

    def run() -> None:
        one @ other

    return run, 2 * width**3 / 1e9


def shares(times: Times, needed: dict[str, float], speed: float) -> dict[str, Spread]:
    """The share of the product's speed that each step reaches.

    Args:
        times: Of the steps and of the product.
        needed: GFLOPs of a step, by its name.
        speed: GFLOPs of the product.
    """
    return {
        name: Spread.of(
            [
                (gflops / own) / (speed / base)
                for own, base in zip(times.seconds[name], times.seconds[PRODUCT], strict=True)
            ]
        )
        for name, gflops in needed.items()
    }


def operators(step: Callable[[], None], setting: Setting, steps: int, rows: int) -> list[tuple[str, float]]:
    """Where the time goes: the operators that take most, with their shares."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if setting.device == "cuda" else []
    key = "self_device_time_total" if setting.device == "cuda" else "self_cpu_time_total"
    step()
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
    found = sorted(((event.key, getattr(event, key)) for event in profiler.key_averages()), key=lambda each: -each[1])
    whole = sum(time for _, time in found)
    return [(name, time / whole) for name, time in found[:rows]]


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
    add_setting(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    use_threads(args.threads)
    setting = Setting.of(args)
    images, labels = batch(args.batch_size)

    trained = {
        FULL: frozenset({"patch_embed", "qkv", "proj", "fc1", "fc2"}),
        "vit_att": frozenset({"qkv"}),
        "vit_mlp": frozenset({"fc1", "fc2"}),
        "vit_att_mlp": frozenset({"qkv", "fc1", "fc2"}),
        "linear probe": frozenset[str](),
    }
    models = {FULL: stock(), "linear probe": frozen()}
    models |= {name: recast(name) for name in trained if name.startswith("vit_")}
    steps = {name: make_step(models[name], images, labels, setting=setting) for name in trained}
    parts = {name: necessary(weights) for name, weights in trained.items()}
    needed = {name: sum(part.values()) for name, part in parts.items()}
    limits = {name: total / needed[FULL] for name, total in needed.items()}
    flops = {} if setting.compile else {name: counted(step) / args.batch_size for name, step in steps.items()}
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    memory = {name: resident(models[name]) + peak for name, peak in peaks.items() if peak is not None}
    run_product, speed = product(setting)
    times = interleaved({**steps, PRODUCT: run_product}, rounds=args.rounds)
    reached = shares(times, {name: args.batch_size * gflops for name, gflops in needed.items()}, speed)

    figures = [
        Figure(
            f"step: {name} / {FULL}",
            times.ratio(name, FULL),
            at_most=TARGET if name == "vit_att" else None,
            limit=limits[name],
        )
        for name in trained
        if name != FULL
    ]
    if FULL in memory:
        figures += [
            Figure(
                f"memory of a step: {name} / {FULL}",
                Spread.of([memory[name] / memory[FULL]]),
                at_most=MEMORY if name == "vit_att" else None,
            )
            for name in memory
            if name != FULL
        ]
    figures += [Figure(f"speed of a step: {name} / {PRODUCT}", reached[name], limit=1) for name in (FULL, "vit_att")]
    name = torch.cuda.get_device_name() if setting.device == "cuda" else ""
    if setting.bf16 and (peak := next((peak for gpu, peak in PEAK.items() if gpu in name), None)):
        for case in (FULL, "vit_att"):
            used = [args.batch_size * needed[case] / 1e3 / seconds / peak for seconds in times.seconds[case]]
            figures.append(
                Figure(f"MFU: {case} / {peak} TFLOP/s of the data sheet", Spread.of(used), at_least=MFU, limit=1)
            )
    spent = operators(steps["vit_att"], setting, steps=3, rows=8)
    part = Report(
        f"training step ({setting}, batch {args.batch_size})",
        times,
        FULL,
        figures,
        columns={
            "limit": {name: f"{limit:.3f}" for name, limit in limits.items()},
            "GFLOPs/image": {name: f"{value:.2f}" for name, value in needed.items()},
            "counted by torch": {name: f"{value:.2f}" for name, value in flops.items()},
            "memory": {name: f"{value:,.0f} MB" for name, value in memory.items()},
        },
        notes=["where the time of vit_att goes: " + ", ".join(f"{op} {share:.1%}" for op, share in spent)],
        extra={"batch_size": args.batch_size, "limits": limits, "needed": parts, "memory_mb": memory},
    ).show()
    write(args.json, "training_step", part)


if __name__ == "__main__":
    main()
