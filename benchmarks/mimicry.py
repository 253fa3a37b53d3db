"""Neural Mimicry of ViT-S/16, all 18 banks of Att+MLP: the closed form against the authors' gradient recipe.

Targets: at most 0.5 s on two cores; at least 300 times as fast as 1000 iterations of `mimicry=gradient`, extrapolated
from 20; at no larger error. The gradient's error comes from one bank and fewer iterations than 1000 (`--error-steps`).
"""

from __future__ import annotations

from functools import partial

import torch

from measuring import Spread, arguments, interleaved, report, use_threads, verdict
from models import TARGETS, stock
from recast_exp.recast import Banks, Group, find_groups, mimic
from recast_exp.recast.bank import reference
from recast_exp.recast.formulas import relative_error

SECONDS, SPEEDUP = 0.5, 300
ITERATIONS, SAMPLE = 1000, 20
CLOSED, GRADIENT = "closed_form", f"gradient, {SAMPLE} iterations"


def error(model: torch.nn.Module, banks: Banks, group: Group) -> float:
    """Largest relative error of a group's weights."""
    layers = group.layers
    rebuilt, weights = [banks.rebuilt(layer) for layer in layers], [reference(model, layer) for layer in layers]
    return relative_error(torch.stack(rebuilt), torch.stack(weights)).max().item()


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
    ratio = times.ratio(GRADIENT, CLOSED)
    report(
        "mimicry",
        times,
        CLOSED,
        notes=[
            verdict(
                f"closed form {seconds.median:.3f} s for {len(groups)} banks, target at most {SECONDS} s",
                seconds,
                at_most=SECONDS,
            ),
            verdict(
                f"{ratio.median * scale:,.0f} times as fast as {ITERATIONS} iterations of the gradient recipe "
                f"({whole:.0f} s, extrapolated from {SAMPLE}), target at least {SPEEDUP}",
                ratio,
                at_least=SPEEDUP / scale,
            ),
            verdict(
                f"relative error {on_first:.1e} on {first.name} ({largest:.1e} at most, over all banks) against "
                f"{of_gradient:.1e} of the gradient recipe after {args.error_steps} iterations",
                Spread.of([on_first / of_gradient]),
                at_most=1,
            ),
        ],
        extra={
            "extrapolated_seconds": whole,
            "speedup": ratio.median * scale,
            "relative_error": {"closed_form": on_first, "closed_form_all_banks": largest, "gradient": of_gradient},
            "error_steps": args.error_steps,
        },
        path=args.json,
    )


if __name__ == "__main__":
    main()
