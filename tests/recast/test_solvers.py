"""The solvers of Neural Mimicry, against numpy's SVD and each other; and what makes a module a solver."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp import plugins
from recast_exp.config.compose import conf_dir
from recast_exp.config.schema import with_values
from recast_exp.errors import UnknownNameError, UserError
from recast_exp.models.backbones import create_backbone
from recast_exp.models.bank_cache import bank_for
from recast_exp.models.check import check_model
from recast_exp.plugins import SOLVERS
from recast_exp.recast import Banks, find_groups, mimic
from recast_exp.recast.formulas import Mimicked, authors_start, combine, cosine_similarity, relative_error
from recast_exp.recast.mimicry import remake
from recast_exp.recast.solvers import autoencoder, check_options, closed_form, gradient

SHAPES = {"linear": (12, 10), "convolution": (12, 4, 3, 3), "depthwise": (12, 1, 3, 3)}
ITERATIVE = {"gradient": gradient, "autoencoder": autoencoder}
# Options with which a solver gets within a factor of the least error on the small weights here.
CLOSE = {"gradient": ({"steps": 500}, 1.02), "autoencoder": ({"steps": 500, "lr": 1e-2}, 1.25)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rebuilt(coefficients: Tensor, templates: Tensor) -> Tensor:
    return torch.stack([combine(layer, templates) for layer in coefficients])


def squared_error(found: tuple[Tensor, Tensor], weights: Tensor) -> float:
    return (rebuilt(found[1], found[0]).double() - weights.double()).square().sum().item()


def least_squared_error(weights: Tensor, num_templates: int, num_blocks: int = 1) -> float:
    """Eckart-Young by numpy: what the singular values beyond the n-th leave, block by block."""
    stacked = weights.double().numpy().reshape(len(weights), num_blocks, -1)
    values = [np.linalg.svd(stacked[:, block], compute_uv=False) for block in range(num_blocks)]
    return float(sum((each[num_templates:] ** 2).sum() for each in values))


# Closed form


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("layers", "sets", "blocks"), [(2, 2, 1), (2, 1, 3), (5, 2, 4)])
def test_closed_form_is_exact_with_a_template_per_layer(
    shape: tuple[int, ...], layers: int, sets: int, blocks: int
) -> None:
    weights = random(layers, *shape)
    found = closed_form.solve(weights, layers, sets, blocks, seed=3)
    assert found.templates.shape == (layers, *shape)
    assert found.coefficients.shape == (layers, sets, blocks, layers)
    assert relative_error(rebuilt(found.coefficients, found.templates), weights).max() < 5e-7


def test_every_weight_stays_a_combination_of_the_pretrained_weights_of_its_group() -> None:
    """W' = A W with A = c c0⁻¹, whatever a task learns (docs/method.md, "What coefficients can reach")."""
    weights = random(3, 12, 10)
    found = closed_form.solve(weights, 3, 2, 1, seed=3)
    learned = found.coefficients + 0.1 * random(*found.coefficients.shape, seed=1)
    mean, start = learned.mean(1).squeeze(1), found.coefficients.mean(1).squeeze(1)
    expected = torch.einsum("lj,j...->l...", mean @ torch.linalg.inv(start), weights)
    torch.testing.assert_close(rebuilt(learned, found.templates), expected)


@pytest.mark.parametrize(("templates", "blocks"), [(3, 1), (2, 2)])
def test_wide_weights_are_made_part_by_part(templates: int, blocks: int) -> None:
    weights = random(3, 10, 3 * closed_form.COLUMNS // 10 + 1)
    found = closed_form.solve(weights, templates, 1, blocks, seed=3)
    coefficients = found.coefficients[:, 0].transpose(0, 1).double()  # [B, L, n]
    whole = torch.linalg.pinv(coefficients) @ weights.view(3, blocks, -1).transpose(0, 1).double()
    expected = whole.transpose(0, 1).reshape(templates, *weights.shape[1:]).float()
    torch.testing.assert_close(found.templates, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("templates", [2, 3])
def test_templates_of_any_weights_are_float32(templates: int) -> None:
    weights = random(3, 10, 7)
    found, expected = (closed_form.solve(each, templates, 1, 1, seed=3) for each in (weights.double(), weights))
    assert (found.templates.dtype, found.coefficients.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found.templates, expected.templates)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_closed_form_is_exact_at_any_scale_and_for_dependent_weights(scale: float) -> None:
    weights = random(4, 12, 10) * scale
    weights[2], weights[3] = weights[0], 0.0
    found = closed_form.solve(weights, 4, 2, 1, seed=3)
    assert (rebuilt(found.coefficients, found.templates) - weights).abs().max() < 1e-6 * weights.abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("templates", [1, 2, 4])
def test_closed_form_reaches_the_least_error_there_is(shape: tuple[int, ...], blocks: int, templates: int) -> None:
    weights = random(5, *shape)
    bound = least_squared_error(weights, templates, blocks)
    assert bound > 1
    assert squared_error(closed_form.solve(weights, templates, 2, blocks, seed=3), weights) == pytest.approx(
        bound, rel=1e-6
    )


def test_finer_granularity_leaves_less_error() -> None:
    weights = random(5, 12, 10)
    errors = [squared_error(closed_form.solve(weights, 2, 1, blocks, seed=3), weights) for blocks in (1, 3, 12)]
    assert all(finer < 0.99 * coarser for coarser, finer in pairwise(errors))


@pytest.mark.parametrize("templates", [2, 3, 6])
def test_coefficients_are_orthonormal_mixed_and_the_same_in_every_set(templates: int) -> None:
    found = closed_form.solve(random(6, 12, 10), templates, 3, 2, seed=3).coefficients
    for block in range(2):
        matrix = found[:, 0, block].double()
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(templates, dtype=torch.float64), rtol=0, atol=1e-6)
        assert np.linalg.cond(matrix.numpy()) < 1 + 1e-5
        assert matrix.abs().max() < 0.999  # templates are mixtures, not copies of the layers
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])


# All solvers


@pytest.mark.parametrize("name", SOLVERS.names())
def test_solvers_are_deterministic_by_seed_and_leave_their_surroundings_alone(name: str) -> None:
    weights = random(4, 12, 10)
    before, state = weights.clone(), torch.get_rng_state()
    options = {"steps": 20} if name in ITERATIVE else {}
    first, again, other = (SOLVERS.load(name).solve(weights, 2, 2, 1, seed=seed, **options) for seed in (5, 5, 6))
    assert torch.equal(weights, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.templates, again.templates)
    assert torch.equal(first.coefficients, again.coefficients)
    assert not torch.allclose(first.coefficients, other.coefficients, atol=1e-2)
    assert not any(tensor.requires_grad for tensor in first)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("shape", [(8, 6), (6, 2, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("templates", "blocks"), [(2, 1), (2, 2)])
def test_no_solver_beats_the_closed_form_and_all_come_close(
    name: str, shape: tuple[int, ...], templates: int, blocks: int
) -> None:
    weights = 0.1 * random(4, *shape)
    bound = least_squared_error(weights, templates, blocks)
    best = squared_error(closed_form.solve(weights, templates, 2, blocks, seed=0), weights)
    options, factor = CLOSE[name]
    error = squared_error(ITERATIVE[name].solve(weights, templates, 2, blocks, seed=0, **options), weights)
    assert best <= bound * (1 + 1e-6)
    assert best <= error * (1 + 1e-6)
    assert error < factor * bound < 0.8 * weights.square().sum().item()


@pytest.mark.parametrize("name", ITERATIVE)
def test_more_steps_help_and_each_reports_progress(name: str) -> None:
    weights, ticks = 0.1 * random(2, 12, 10), []
    errors = [
        squared_error(
            ITERATIVE[name].solve(weights, 2, 2, 1, seed=0, steps=steps, progress=lambda: ticks.append(1)), weights
        )
        for steps in (1, 30, 300)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert len(ticks) == 331


def test_gradient_keeps_its_best_step() -> None:
    weights = 0.1 * random(2, 12, 10)
    start = squared_error(gradient.solve(weights, 2, 2, 1, seed=0, steps=1), weights)
    assert squared_error(gradient.solve(weights, 2, 2, 1, seed=0, steps=20, lr=50.0), weights) <= start * (1 + 1e-6)


def test_the_autoencoder_keeps_its_most_similar_step() -> None:
    weights = 0.1 * random(4, 12, 10)

    def similarity(found: Mimicked) -> float:
        return cosine_similarity(rebuilt(found.coefficients, found.templates), weights).mean().item()

    found = [similarity(autoencoder.solve(weights, 2, 2, 1, seed=0, steps=steps, lr=1.0)) for steps in (1, 2, 4, 8, 40)]
    # The cosine schedule makes runs of different lengths differ, but their first step is the same
    assert min(found) == pytest.approx(found[0])
    assert found[-1] > found[0]


def test_the_encoder_starts_as_torch_starts_linear_layers() -> None:
    first, gate, second, gate_too, last = autoencoder._encoder(900, 100, 600, seed=0)  # type: ignore[misc]
    assert isinstance(gate, nn.LeakyReLU) and isinstance(gate_too, nn.LeakyReLU)
    for layer, width in ((first, 900), (second, 100), (last, 100)):
        bound = width**-0.5
        for values, nearly in ((layer.weight, 0.97), (layer.bias, 0.9)):
            assert nearly * bound < values.max() <= bound
            assert -bound <= values.min() < -nearly * bound


def test_the_authors_recipe_of_the_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = 0.1 * random(4, 12, 10), []
    make = torch.optim.RMSprop

    def noted(parameters: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        seen.append((lr, [tuple(each.shape) for each in parameters], parameters[-1].square().mean().sqrt().item()))
        return make(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "RMSprop", noted)
    autoencoder.solve(weights, 2, 3, 1, seed=0, steps=1)
    ((lr, shapes, size),) = seen
    assert autoencoder.num_steps(weights) == 2500
    assert lr == 2e-3
    assert shapes == [(8, 120), (8,), (8, 8), (8,), (6, 8), (6,), (2, 12, 10)]
    assert size == pytest.approx(1.0)


# Plug-ins

FOREIGN = """
import torch
from recast_exp.recast.formulas import Mimicked

def num_steps(weights, *, steps=None, **others):
    return steps or 4

def solve(weights, num_templates, num_sets, num_blocks, *, seed, progress, steps=None, scale=1.0, lr=None):
    for _ in range(num_steps(weights, steps=steps)):
        progress()
    shape = (len(weights), num_sets, num_blocks, num_templates)
    return Mimicked(scale * weights[:num_templates].float(), torch.full(shape, lr or 0.5))
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A solver of another package, installed as pip would install it."""
    folder = tmp_path / "site"
    info = folder / "foreign_solver-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-solver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[recast_exp.solvers]\nforeign = foreign_solver\n")
    (folder / "foreign_solver.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(folder)
    plugins._entry_points.cache_clear()
    yield "foreign"
    plugins._entry_points.cache_clear()
    sys.modules.pop("foreign_solver", None)


def bank(cfg: Any, cache: Path) -> tuple[Banks, dict[str, Any], Path]:
    """The bank of a configuration, and the settings and path of its entry in the index of the cache."""
    check_model(cfg.model, cfg.recast, cfg.mimicry, cfg.adapter)
    banks, _ = bank_for(create_backbone(cfg.model), cfg.recast, cfg.mimicry, cache)
    (index,) = (cache / "banks" / "index").glob("*.json")
    return banks, json.loads(index.read_text()), index


def test_each_solver_has_a_preset_and_each_preset_a_solver() -> None:
    assert sorted(path.stem for path in (conf_dir() / "mimicry").glob("*.yaml")) == SOLVERS.names()


def test_a_solver_of_another_package_is_an_option_like_any(
    foreign: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SOLVERS.names() == ["autoencoder", "calibrated", "closed_form", foreign, "gradient"]
    totals: list[int] = []
    monkeypatch.setattr(
        "recast_exp.models.bank_cache.Progress.add_task", lambda self, text, total: totals.append(total)
    )
    ticks: list[int] = []
    monkeypatch.setattr("recast_exp.models.bank_cache.Progress.advance", lambda self, task: ticks.append(1))
    typed = ("mimicry.name=foreign", "mimicry.lr=0.25", "mimicry.noise=3", "mimicry.options={scale: 2.0}")
    banks, entry, _ = bank(tiny("model=vit_att", *typed), tmp_path)
    assert entry["settings"]["mimicry"] == {"name": foreign, "seed": 42, "steps": None, "lr": 0.25, "scale": 2.0}
    assert totals == [4 * len(banks.groups)]
    assert len(ticks) == totals[0]
    assert all((value == 0.25).all() for value in banks.coefficients.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: None, "solver: expected foreign to return a Mimicked, got NoneType"),
        (
            lambda found: found._replace(coefficients=found.coefficients[:, :1]),
            r"solver: expected foreign to return coefficients \[2, 2, 1, 2\] of blocks.attn.qkv.0, got \[2, 1, 1, 2\]",
        ),
        (
            lambda found: found._replace(templates=found.templates[..., 1:]),
            r"solver: expected foreign to return templates \[2, 24, 8\] of blocks.attn.qkv.0, got \[2, 24, 7\]",
        ),
    ],
)
def test_what_a_solver_returns_is_looked_at(
    foreign: str, change: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set of coefficients instead of two would be a model with half the parameters."""
    solver = SOLVERS.load(foreign)
    right = solver.solve
    monkeypatch.setattr(solver, "solve", lambda *given, **options: change(right(*given, **options)))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=8, num_heads=2)
    with pytest.raises(UserError, match=f"^{message}$"):
        mimic(model, find_groups(model, targets=["*.attn.qkv"]), solver=foreign)


def test_a_module_that_solves_nothing(foreign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SOLVERS.load(foreign), "solve")
    with pytest.raises(UserError, match=r"the module foreign_solver of foreign to have the function solve, got none$"):
        check_options(foreign, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mimicry.name": "nope"},
            "mimicry.name: expected one of autoencoder, calibrated, closed_form, gradient, got 'nope'",
        ),
        (
            {"mimicry.options": {"steps": 3}},
            "mimicry.options.steps: expected no options (solver closed_form), got steps",
        ),
    ],
)
def test_an_unknown_solver_or_option_is_refused_before_anything_is_made(
    values: dict[str, Any], message: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = with_values(tiny("model=vit_att"), values)
    with pytest.raises(UnknownNameError, match=rf"^{re.escape(message)}$"):
        check_model(cfg.model, cfg.recast, cfg.mimicry, cfg.adapter)
    with pytest.raises(UnknownNameError, match=rf"^{re.escape(message)}$"):
        bank_for(create_backbone(cfg.model), cfg.recast, cfg.mimicry, tmp_path)


def test_mimic_names_its_own_arguments() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))})
    groups = find_groups(model)
    with pytest.raises(UnknownNameError, match=r"^solver: expected one of autoencoder, .*, got 'nope'$"):
        mimic(model, groups, solver="nope")
    expected = "options.step: expected one of steps, lr, step_size, noise (solver gradient), got step"
    with pytest.raises(UnknownNameError, match=rf"^{re.escape(expected)}$"):
        mimic(model, groups, solver="gradient", step=3)


# The keys of banks in the cache, as the first version wrote them: a changed one would not find the old banks again.
RECORDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "closed_form": ((), {"name": "closed_form", "seed": 42}),
    "gradient": (
        ("mimicry.steps=2", "mimicry.lr=0.2", "mimicry.hidden=5"),
        {"name": "gradient", "seed": 42, "steps": 2, "lr": 0.2, "step_size": None, "noise": None},
    ),
    "autoencoder": (
        ("mimicry.steps=2", "mimicry.seed=7", "mimicry.noise=0.5"),
        {"name": "autoencoder", "seed": 7, "steps": 2, "lr": None, "hidden": 8},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_banks_in_old_caches_are_found_again(name: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    typed, record = RECORDS[name]
    cfg = tiny("model=vit_att", f"mimicry={name}", "recast.num_groups=1", "recast.num_templates=1", *typed)
    banks, entry, index = bank(cfg, tmp_path)
    settings = {
        "backbone": "digits_vit",
        "fingerprint": create_backbone(cfg.model).fingerprint,
        "num_coefficient_sets": 2,
        "mimicry": record,
    }
    assert entry["settings"] == settings
    layers = [f"blocks.{number}.attn.qkv" for number in range(12)]
    groups = [{"name": "blocks.attn.qkv.0", "layers": layers, "num_templates": 1, "num_blocks": 1}]
    text = json.dumps([settings, groups], sort_keys=True).encode()
    assert index.stem == hashlib.sha256(text).hexdigest()[:32]
    assert banks.settings == settings


@pytest.mark.parametrize(("solver", "options"), [("closed_form", {}), ("gradient", {"steps": 3})])
def test_templates_are_made_again_as_they_were(solver: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 6)}) for _ in range(4)])})
    groups = find_groups(model, num_templates=1)
    banks = mimic(model, groups, solver=solver, num_sets=3, seed=5, **options)
    assert banks.origin is not None
    assert remake(model, groups, banks.origin).hash == banks.hash
    before = banks.origin.weights
    with torch.no_grad():
        model.get_submodule("blocks.1.layer").weight += 1  # type: ignore[operator]
    found = mimic(model, groups).origin
    assert found is not None
    with pytest.raises(
        UserError,
        match=rf"^model: .* made from \({before[:16]}…\), got others \({found.weights[:16]}…\)$",
    ):
        remake(model, groups, banks.origin)


@pytest.mark.parametrize(
    ("shape", "steps", "lr", "step_size", "noise"),
    [((2, 6, 4), 1000, 0.1, 200, 1e-4), ((2, 6, 4, 1, 1), 3000, 0.2, 500, 0.0), ((2, 6, 4, 3, 3), 3000, 0.2, 500, 0.0)],
)
def test_the_authors_recipe_for_linear_layers_and_for_convolutions(
    shape: tuple[int, ...], steps: int, lr: float, step_size: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert gradient.num_steps(weights) == steps
    assert gradient.num_steps(weights, steps=7) == 7
    drops: list[tuple[int, float, float]] = []
    norms: set[float] = set()
    schedule, clip = torch.optim.lr_scheduler.StepLR, nn.utils.clip_grad_norm_

    def noted(optimizer: Any, size: int, gamma: float) -> object:
        drops.append((optimizer.param_groups[0]["lr"], size, gamma))
        return schedule(optimizer, size, gamma)

    def clipped(parameters: Any, most: float) -> object:
        norms.add(most)
        return clip(parameters, most)

    monkeypatch.setattr(torch.optim.lr_scheduler, "StepLR", noted)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)
    default = gradient.solve(weights, 2, 2, 1, seed=1, steps=5)
    explicit = gradient.solve(weights, 2, 2, 1, seed=1, steps=5, lr=lr, step_size=step_size, noise=noise)
    other = gradient.solve(weights, 2, 2, 1, seed=1, steps=5, lr=lr, step_size=step_size, noise=noise + 0.1)
    assert drops == [(lr, step_size, 0.1)] * 3
    assert norms == {1.0}
    assert torch.equal(default.templates, explicit.templates)
    assert torch.equal(default.coefficients, explicit.coefficients)
    assert not torch.equal(other.coefficients, explicit.coefficients)


def test_the_noise_is_added_to_the_first_coefficients() -> None:
    weights = random(3, 8, 6)
    found = gradient.solve(weights, 2, 2, 1, seed=4, steps=1, noise=0.5)
    generator = torch.Generator().manual_seed(4)
    templates, start = authors_start(weights, 2, 2, 1, generator)
    assert torch.equal(found.templates, templates)
    torch.testing.assert_close(found.coefficients, start + 0.5 * torch.randn(start.shape, generator=generator))


def test_the_authors_start_is_kaiming_normal_with_unit_vectors() -> None:
    weights = torch.zeros(3, 400, 50, 2, 2, dtype=torch.float64)
    templates, coefficients = authors_start(weights, 4, 2, 5, torch.Generator().manual_seed(0))
    assert templates.shape == (4, 400, 50, 2, 2) and templates.dtype == torch.float64
    assert templates.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.01)
    assert coefficients.shape == (3, 2, 5, 4) and coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients.norm(dim=-1), torch.ones(3, 2, 5, dtype=torch.float64))


def test_the_authors_start_for_one_layer_and_for_one_row() -> None:
    for shape in ((1, 30, 40), (3, 1, 40)):
        templates, _ = authors_start(torch.zeros(shape), 50, 1, 1, torch.Generator().manual_seed(0))
        assert templates.std().item() == pytest.approx((2 / 40) ** 0.5, rel=0.05)


def test_each_group_has_the_next_seed_and_after_the_largest_comes_0(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 6)}) for _ in range(6)])})
    seeds: list[int] = []
    solve = closed_form.solve
    monkeypatch.setattr(closed_form, "solve", lambda *args, seed, **rest: seeds.append(seed) or solve(*args, seed=seed))
    mimic(model, find_groups(model), seed=2**32 - 2)
    assert seeds == [2**32 - 2, 2**32 - 1, 0]


def test_the_closed_form_mixes_by_a_matrix_that_is_orthogonal_in_float64() -> None:
    matrix = closed_form._random_orthogonal(7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-13)
