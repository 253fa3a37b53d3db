"""The embedded backbones: small timm models that are pretrained here, on digits 0-4, the first time they are used.

They make the default run self-contained: no download, real images, and a backbone that knows digits but has never
seen the task's five classes. Each is registered with timm under its name and trained once by a fixed recipe with a
fixed seed, apart from the run's; the weights are kept in the user's cache.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from recast_exp.files import alone_at, json_hash, replacing

log = logging.getLogger(__name__)

SIZE = 16
PRETRAINED_CFG = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
# What the weights depend on, and so the key of the cached file.
RECIPES: dict[str, dict[str, Any]] = {
    "digits_vit": {"epochs": 24, "lr": 1e-3, "batch_size": 32, "seed": 0, "width": 96, "heads": 3, "patch": 4},
    "digits_resnet": {"epochs": 30, "lr": 2e-3, "batch_size": 32, "seed": 0, "channels": [16, 24, 32, 48]},
}
EMBEDDED = tuple(RECIPES)


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def digits_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT of 12 blocks, as deep as a ViT-S, for 16 px images."""
    recipe = RECIPES["digits_vit"]
    defaults: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": recipe["patch"],
        "embed_dim": recipe["width"],
        "depth": 12,
    }
    return _registered(VisionTransformer(**(defaults | {"num_heads": recipe["heads"]} | _timm_kwargs(kwargs))))


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def digits_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet with the blocks of a ResNet-34 and few channels, for 16 px images."""
    defaults: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (3, 4, 6, 3),
        "channels": tuple(RECIPES["digits_resnet"]["channels"]),
    }
    stem: dict[str, Any] = {"stem_width": 16, "replace_stem_pool": True}
    return _registered(ResNet(**(defaults | stem | _timm_kwargs(kwargs))))


def _timm_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Timm hands every model its own bookkeeping too."""
    return {
        name: value
        for name, value in kwargs.items()
        if name not in {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    }


def _registered(network: nn.Module) -> nn.Module:
    timm_model: Any = network
    timm_model.pretrained_cfg = timm_model.default_cfg = dict(PRETRAINED_CFG)
    return network


def pretrained_weights(name: str, cache: Path) -> Path:
    """The file with an embedded backbone's weights; trained first, with a progress bar, where the cache lacks it."""
    recipe = RECIPES[name]
    path = cache / "backbones" / f"{name}-{json_hash(recipe)}.safetensors"
    if path.is_file():
        return path
    with alone_at(path):
        if not path.is_file():
            log.info("Pretraining %s on digits 0-4, once (kept in %s)", name, path.parent)
            network = _pretrain(name, recipe)
            with replacing(path) as temporary:
                save_file({key: value.contiguous() for key, value in network.state_dict().items()}, temporary)
    return path


def _pretrain(name: str, recipe: dict[str, Any]) -> nn.Module:
    """Train all weights on the source digits with the project's own training loop."""
    from recast_exp.config.schema import Config
    from recast_exp.data import load_dataset
    from recast_exp.data.datamodule import ImageDataModule
    from recast_exp.data.transforms import InputSpec
    from recast_exp.experiment.experiment import EVAL_BATCH_SIZE
    from recast_exp.models.adapted import assemble_full
    from recast_exp.training.loop import fit, quiet

    cfg = OmegaConf.structured(Config)
    cfg.seed = recipe["seed"]
    cfg.dataset.update({"name": "digits", "part": "source", "transform": "shift", "batch_size": recipe["batch_size"]})
    cfg.optimizer.update({"lr": recipe["lr"], "weight_decay": 0.05, "backbone_lr": recipe["lr"]})
    cfg.scheduler.update({"name": "cosine", "warmup_epochs": 3})
    cfg.trainer.update({"accelerator": "cpu", "num_threads": 1, "max_epochs": recipe["epochs"]})
    cfg.model.batchnorm_statistics = "update"
    images = load_dataset(cfg.dataset, Path(cfg.data_dir))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        network: nn.Module = digits_vit(num_classes=0) if name == "digits_vit" else digits_resnet(num_classes=0)
        adapted = assemble_full(network, num_classes=len(images.classes), update_batchnorm=True)
        spec = InputSpec(SIZE, PRETRAINED_CFG["mean"], PRETRAINED_CFG["std"], 1.0, "bilinear")  # type: ignore[arg-type]
        data = ImageDataModule(
            images,
            spec,
            transform=cfg.dataset.transform,
            batch_size=cfg.dataset.batch_size,
            eval_batch_size=EVAL_BATCH_SIZE,
            seed=cfg.seed,
        )
        with quiet():
            result = fit(cfg, adapted, data, description=f"pretraining {name}")
    log.info("%s: validation accuracy %.1f %% on its own digits", name, 100 * result.metrics["val/accuracy"])
    timm_model: Any = network
    timm_model.reset_classifier(0)
    network.eval()
    return network
