"""Neural Mimicry of ViT-S/16, all 18 banks of Att+MLP: the closed form against the authors' gradient recipe.

Targets: at most 0.5 s on two cores; at least 300 times as fast as 1000 iterations of `mimicry=gradient`, extrapolated
from 20; at no larger error. The gradient's error comes from one bank and fewer iterations than 1000 (`--error-steps`).

Then the closed form on larger and larger backbones, ViT-Ti to ViT-L and ResNets, all banks of each. Target: a weight of
the largest takes at most twice the time of a weight of the smallest, so that the time grows with the number of weights.
"""

from __future__ import annotations

from functools import partial

import timm
import torch

from measuring import Figure, Report, Spread, Times, arguments, interleaved, use_threads, write
from models import TARGETS, stock
from recast_exp.recast import Banks, Group, find_groups, mimic
from recast_exp.recast.formulas import relative_error
from recast_exp.recast.weights import reference

SECONDS, SPEEDUP = 0.5, 300
ITERATIONS, SAMPLE = 1000, 20
SIZES = {
    "ViT": [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")],
    "ResNet": ["resnet18", "resnet34", "resnet50"],
}
CONVOLUTIONS = ["layer?.[!0]*.conv1", "layer?.[!0]*.conv2"]
GROWTH = 2.0
CLOSED, GRADIENT = "closed_form", f"gradient, {SAMPLE} iterations"


def error(model: torch.nn.Module, banks: Banks, group: Group) -> float:
    """Largest relative error of a group's weights."""
    layers = group.layers
    rebuilt, weights = [banks.rebuilt(layer) for layer in layers], [reference(model, layer) for layer in layers]
    return relative_error(torch.stack(rebuilt), torch.stack(weights)).max().item()


def growth(rounds: int) -> Report:
    """The closed form on backbones of many sizes; the ratios are of the time for one weight."""
    cases, numbers = {}, {}
    for family, names in SIZES.items():
        for name in names:
            model = timm.create_model(name, pretrained=False)
            targets = TARGETS["vit_att_mlp"] if family == "ViT" else CONVOLUTIONS
            groups = find_groups(model, targets=targets, num_groups=6 if family == "ViT" else 1)
            numbers[name] = sum(reference(model, layer).numel() for group in groups for layer in group.layers)
            cases[name] = partial(mimic, model, groups)
    times = interleaved(cases, rounds=rounds)

    def each(parts: dict[str, list[float]]) -> dict[str, list[float]]:
        return {name: [seconds / numbers[name] for seconds in all_seconds] for name, all_seconds in parts.items()}

    of_one = Times(each(times.seconds), each(times.processor))
    return Report(
        "closed form on backbones of many sizes",
        times,
        next(iter(cases)),
        [
            Figure(
                f"mimicry, time of a weight: {names[-1]} / {names[0]}",
                of_one.ratio(names[-1], names[0]),
                at_most=GROWTH,
                limit=1,
            )
            for names in SIZES.values()
        ],
        columns={
            "weights": {name: f"{count:,}" for name, count in numbers.items()},
            "ns for a weight": {name: f"{1e9 * of_one.spread(name).median:.1f}" for name in cases},
        },
        extra={"weights": numbers},
    )


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--error-steps", type=int, default=200, help="gradient iterations for its error")
    args = parser.parse_args()
    use_threads(args.threads)
    model = stock()
    groups = find_groups(model, targets=TARGETS["vit_att_mlp"], num_groups=6)
    cases = {CLOSED: partial(mimic, model, groups)}
    cases[GRADIENT] = partial(mimic, model, groups, solver="gradient", steps=SAMPLE)
    times = interleaved(cases, rounds=args.rounds)
    closed, first = mimic(model, groups), groups[0]
    largest = max(error(model, closed, group) for group in groups)
    on_first = error(model, closed, first)
    of_gradient = error(model, mimic(model, [first], solver="gradient", steps=args.error_steps), first)
    seconds, scale = times.spread(CLOSED), ITERATIONS / SAMPLE
    whole = times.spread(GRADIENT).median * scale
    speedup = times.ratio(GRADIENT, CLOSED)
    speedup = Spread(
        *(scale * value for value in (speedup.median, speedup.min, speedup.max)),
        (scale * speedup.quartiles[0], scale * speedup.quartiles[1]),
    )
    part = Report(
        "mimicry",
        times,
        CLOSED,
        [
            Figure(f"mimicry: closed form, {len(groups)} banks", seconds, "s", at_most=SECONDS),
            Figure(f"mimicry: {ITERATIONS} iterations of the gradient recipe / closed form", speedup, at_least=SPEEDUP),
            Figure(
                f"mimicry, relative error: closed form / gradient recipe after {args.error_steps} iterations",
                Spread.of([on_first / of_gradient]),
                at_most=1,
            ),
        ],
        notes=[
            f"{ITERATIONS} iterations: {whole:.0f} s, extrapolated from {SAMPLE}; relative error {on_first:.1e} on "
            f"{first.name} ({largest:.1e} at most, over all banks), {of_gradient:.1e} of the gradient recipe"
        ],
        extra={
            "extrapolated_seconds": whole,
            "relative_error": {"closed_form": on_first, "closed_form_all_banks": largest, "gradient": of_gradient},
            "error_steps": args.error_steps,
        },
    ).show()
    write(args.json, "mimicry", part, growth(args.rounds).show())


if __name__ == "__main__":
    main()
