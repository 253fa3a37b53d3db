"""The command line: Hydra's, with everything that was typed checked first. `main` is the entry point."""

from __future__ import annotations

import sys
import logging
import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from recast_exp import composition, overrides
from recast_exp.errors import UserError

log = logging.getLogger("recast_exp")


def task(cfg: DictConfig) -> float | None:
    from recast_exp.stages import run

    metrics = run(cfg, Path(HydraConfig.get().runtime.output_dir))
    return metrics.get("val/accuracy")


def main() -> None:
    args = get_args_parser().parse_intermixed_args()
    texts = overrides.rewrite(args.overrides, multirun=args.multirun)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    loader = composition.open_loader(args.config_path, args.config_dir)
    for t in texts:
        o = overrides.parse(t)
        if o and o.key_or_group == "seed":
            for v in overrides.sweep_values(o):
                composition.store_seed(v.strip('"'), loader.get_group_options("seed"))
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    sys.argv[1:] = flags + texts
    hydra.main(version_base="1.3", config_path=str(composition.conf_dir()), config_name="config")(task)()
