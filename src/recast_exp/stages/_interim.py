from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from recast_exp.config.schema import Config


def untyped(settings: Config) -> DictConfig:
    cfg = OmegaConf.structured(settings)
    assert isinstance(cfg, DictConfig)
    return cfg
