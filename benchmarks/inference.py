"""Inference of ViT-S/16 at 224 px: stock timm, merged RECAST and unmerged RECAST.

Target: merged takes 1.00 ± 0.02 of stock timm's time: it *is* stock timm again. The row "stock again" is a second copy
of stock timm: what it differs from 1.00 by is the noise of the measurement.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch

from measuring import arguments, interleaved, report, use_threads, verdict
from models import recast, stock
from recast_exp.recast import merge

TARGET = 0.02


def main() -> None:
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    use_threads(args.threads)
    unmerged = {name: recast(name) for name in ("vit_att", "vit_att_mlp")}
    models = {"stock": stock(), "stock again": stock()}
    for name, model in unmerged.items():
        models |= {f"{name} merged": merge(deepcopy(model)), f"{name} unmerged": model}
    images = torch.randn(args.batch_size, 3, 224, 224)
    with torch.inference_mode():
        times = interleaved(
            {name: partial(model.eval(), images) for name, model in models.items()}, rounds=args.rounds, warmup=2
        )
    merged = {name: times.ratio(f"{name} merged", "stock") for name in unmerged}
    report(
        "inference",
        times,
        "stock",
        notes=[
            verdict(
                f"{name} merged {ratio.median:.3f}, target 1.00 ± {TARGET:.2f}",
                ratio,
                at_least=1 - TARGET,
                at_most=1 + TARGET,
            )
            for name, ratio in merged.items()
        ],
        extra={"batch_size": args.batch_size},
        path=args.json,
    )


if __name__ == "__main__":
    main()
