"""What an adapter adds to a training step on ViT-S/16, and MeLo against the LoRA of `peft` on the same frozen backbone.

Forward, loss, backward and AdamW, 224 px, float32. Targets: RECAST-Att with MeLo takes at most 1.10 of RECAST-Att
alone; plain MeLo at most 1.05 of peft's LoRA, rank 4, on the fused projection of the same backbone.

peft puts one update of rank r on the whole fused projection (queries, keys and values share A); MeLo has one each for
queries and values. Both have 4·d·r parameters in a block.
"""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from measuring import Figure, Report, arguments, interleaved, use_threads, write
from models import Setting, add_setting, batch, frozen, recast
from recast_exp.adapters import inject_adapter
from recast_exp.adapters.melo import MeLo
from training_step import make_step

RECAST, RECAST_MELO, MELO, LORA = "vit_att", "vit_att + melo", "melo", "peft's LoRA"


def with_melo(model: nn.Module) -> nn.Module:
    for path in inject_adapter(model, MeLo()).values():
        model.get_parameter(path).requires_grad_(True)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"]), model)
    for parameter in head:
        parameter.requires_grad_(True)
    return model


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    add_setting(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    use_threads(args.threads)
    setting = Setting.of(args)
    images, labels = batch(args.batch_size)
    models = {
        RECAST: recast("vit_att"),
        RECAST_MELO: with_melo(recast("vit_att")),
        MELO: with_melo(frozen()),
        LORA: with_lora(frozen()),
    }
    numbers = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    steps = {name: make_step(model, images, labels, setting=setting) for name, model in models.items()}
    times = interleaved(steps, rounds=args.rounds)
    part = Report(
        f"adapters ({setting}, batch {args.batch_size})",
        times,
        RECAST,
        [
            Figure(f"step: {RECAST_MELO} / {RECAST}", times.ratio(RECAST_MELO, RECAST), at_most=1.10),
            Figure(f"step: {MELO} / {LORA}", times.ratio(MELO, LORA), at_most=1.05),
        ],
        columns={"trained parameters": {name: f"{count:,}" for name, count in numbers.items()}},
        extra={"batch_size": args.batch_size},
    ).show()
    write(args.json, "adapters", part)


if __name__ == "__main__":
    main()
