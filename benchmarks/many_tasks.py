"""One batch of many tasks on ViT-S/16 at 112 px, and the switch from one task to another.

64 images (`--images`) belong to 1, 2, 6, 50 or 64 tasks (`--tasks`) of `vit_att` (`--model vit_mlp` for the MLPs). A
batch takes

    mixed       what RecastModel does: one pass, in which a layer has the weights of one task after the other
    products    one pass, in which a layer takes products with the templates
    grouping    a forward pass for each task
    switching   a forward pass for each image
    peft        peft's LoRA (r = 8 on qkv) with `adapter_names`, which loops over the adapters in each layer

against a plain forward pass of stock timm. Heads have ten classes, but peft's adapters share one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peft
import timm
import torch
from torch import Tensor

from measuring import Figure, Report, arguments, interleaved, use_threads, write
from models import BACKBONE, CLASSES, TARGETS
from recast_exp import RecastConfig, RecastModel
from recast_exp.recast import mixed

SIZE = 112
TASKS = (1, 2, 6, 50, 64)
TARGET, SWITCH = 1.30, 1e-3


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--model", choices=sorted(TARGETS), default="vit_att")
    parser.add_argument("--images", type=int, default=64, help="images in the batch")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS, help="numbers of tasks in the batch")
    parser.add_argument("--no-peft", action="store_true", help="without peft, which takes long to make 1,000 adapters")
    args = parser.parse_args()
    use_threads(args.threads)
    torch.manual_seed(0)
    images, counts = torch.randn(args.images, 3, SIZE, SIZE), args.tasks
    stock = timm.create_model(BACKBONE, img_size=SIZE, num_classes=CLASSES).eval()
    model = RecastModel.from_timm(
        BACKBONE, img_size=SIZE, pretrained=False, recast=RecastConfig(targets=TARGETS[args.model])
    )
    for number in range(max(counts)):
        model.add_task(str(number), CLASSES)
    lora = with_lora(2 if args.no_peft else max(2, *counts))

    cases: dict[str, Callable[[], object]] = {"stock timm": partial(stock, images)}
    for count in counts:
        names = [str(number % count) for number in range(args.images)]
        cases |= {
            f"{count} mixed": partial(model, images, tasks=names),
            f"{count} products": partial(with_products, model, images, names),
            f"{count} grouping": partial(task_by_task, model, images, names),
            f"{count} switching": partial(one_by_one, model, images, names),
        }
        if not args.no_peft:
            cases[f"{count} peft"] = partial(lora, images, adapter_names=names)
    with torch.inference_mode():
        times = interleaved(cases, rounds=args.rounds)
    figures = []
    for count in counts:
        others = [f"{count} {way}" for way in ("grouping", "switching", *(() if args.no_peft else ("peft",)))]
        cheapest = min(others, key=lambda case: times.spread(case).median)
        mixed_case = f"{count} mixed"
        figures += [
            Figure(f"batch of {count} tasks / plain pass", times.ratio(mixed_case, "stock timm"), at_most=TARGET),
            Figure(
                f"batch of {count} tasks / cheapest other ({cheapest.split()[1]})",
                times.ratio(mixed_case, cheapest),
                at_most=1,
            ),
        ]
    speeds = {case: f"{args.images / times.spread(case).median:,.0f}" for case in times.seconds}
    title = f"{args.images} images of many tasks ({args.model})"
    batches = Report(title, times, "stock timm", figures, columns={"images/s": speeds}).show()

    ours, theirs = "RecastModel.set_task", "peft's set_adapter"
    switches = interleaved(
        {ours: partial(switch, model.set_task), theirs: partial(switch, lora.set_adapter)}, rounds=10 * args.rounds
    )
    changed = Report(
        "switch of two tasks, and back",
        switches,
        ours,
        [
            Figure("two switches of a task", switches.spread(ours), "s", at_most=2 * SWITCH),
            Figure(f"switch of a task: {theirs} / {ours}", switches.ratio(theirs, ours)),
        ],
    ).show()
    write(args.json, "many_tasks", batches, changed)


def with_lora(tasks: int) -> peft.PeftModel:
    """Stock timm with one LoRA a task."""
    stock = timm.create_model(BACKBONE, img_size=SIZE, num_classes=CLASSES)
    config = peft.LoraConfig(r=8, target_modules=["qkv"])
    model = peft.get_peft_model(stock, config, adapter_name="0")
    for number in range(1, tasks):
        model.add_adapter(str(number), config)
    model.eval()
    return model


def with_products(model: RecastModel, images: Tensor, names: list[str]) -> object:
    """A mixed batch, by products with the templates."""
    before = mixed.WEIGHTS_FROM
    mixed.WEIGHTS_FROM = 1 << 62
    try:
        return model(images, tasks=names)
    finally:
        mixed.WEIGHTS_FROM = before


def task_by_task(model: RecastModel, images: Tensor, names: list[str]) -> list[Tensor]:
    """The images of each task in a pass of their own."""
    found = []
    for name in dict.fromkeys(names):
        model.set_task(name)
        found.append(model(images[[row for row, each in enumerate(names) if each == name]]))
    return found


def one_by_one(model: RecastModel, images: Tensor, names: list[str]) -> list[Tensor]:
    """A batch image by image."""
    found = []
    for image, name in zip(images, names, strict=True):
        model.set_task(name)
        found.append(model(image[None]))
    return found


def switch(to: Callable[[str], object]) -> None:
    """From one task to another, and back."""
    to("1")
    to("0")


if __name__ == "__main__":
    main()
