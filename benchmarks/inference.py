"""Inference of ViT-S/16 at 224 px: stock timm, merged RECAST and unmerged RECAST.

Target: merged takes 1.00 ± 0.02 of stock timm's time: it *is* stock timm again. The row "stock again" is a second copy
of stock timm: what it differs from 1.00 by is the noise of the measurement.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch

from measuring import Figure, Report, arguments, interleaved, use_threads, write
from models import Setting, add_setting, recast, stock
from recast_exp.recast import merge

TARGET = 0.02


def main() -> None:
    parser = arguments(__doc__, rounds=20)
    add_setting(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    use_threads(args.threads)
    setting = Setting.of(args)
    unmerged = {name: recast(name) for name in ("vit_att", "vit_att_mlp")}
    models = {"stock": stock(), "stock again": stock()}
    for name, model in unmerged.items():
        models |= {f"{name} merged": merge(deepcopy(model)), f"{name} unmerged": model}
    images = torch.randn(args.batch_size, 3, 224, 224)
    with torch.inference_mode(), setting.autocast():
        forwards = {name: partial(setting.compiled(model.eval()), images) for name, model in models.items()}
        times = interleaved(forwards, rounds=args.rounds, warmup=2)
    figures = [Figure("inference: stock again / stock", times.ratio("stock again", "stock"))]
    for name in unmerged:
        merged, active = (times.ratio(f"{name} {state}", "stock") for state in ("merged", "unmerged"))
        figures += [
            Figure(f"inference: {name} merged / stock", merged, at_least=1 - TARGET, at_most=1 + TARGET, limit=1),
            Figure(f"inference: {name} unmerged / stock", active),
        ]
    title = f"inference ({setting}, batch {args.batch_size})"
    part = Report(title, times, "stock", figures, extra={"batch_size": args.batch_size}).show()
    write(args.json, "inference", part)


if __name__ == "__main__":
    main()
