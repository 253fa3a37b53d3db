"""New blocks of recombined weights, against a deeper stock model that has them as its own."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp.adapters import inject_adapter
from recast_exp.adapters.growth import Growth
from recast_exp.config.schema import MimicryConfig, ModelConfig, RecastConfig
from recast_exp.errors import UnfitError, UserError
from recast_exp.models.check import check_model
from support.helpers import assert_one_line

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def vit(depth: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=depth, embed_dim=24, num_heads=2
    )
    return model.eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def grown(depth: int, blocks: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with new blocks whose coefficients have moved and whose gates are open, and its parameters."""
    model = vit(depth)
    trained = inject_adapter(model, Growth(blocks=blocks))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for public, path in trained.items():
            parameter = model.get_parameter(path)
            if public.endswith("gate"):
                parameter.fill_(1)
            else:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, {public: model.get_parameter(path).detach() for public, path in trained.items()}


def deeper(depth: int, after: list[int], found: dict[str, Tensor]) -> nn.Module:
    """A stock model with copies of blocks after some of them, and with the weights that the formula says."""
    stock = vit(depth)
    model = vit(depth + len(after))
    model.load_state_dict({name: value for name, value in stock.state_dict().items() if "blocks" not in name}, False)
    place = 0
    for index in range(depth):
        model.blocks[place].load_state_dict(stock.blocks[index].state_dict())
        place += 1
        if index in after:
            model.blocks[place].load_state_dict(stock.blocks[index].state_dict())
            for layer in LAYERS:
                c = found[f"blocks.{index}.growth.coefficients.{layer.replace('.', '_')}"]
                weights = torch.stack([block.get_submodule(layer).weight for block in stock.blocks])
                model.blocks[place].get_submodule(layer).weight.copy_(torch.einsum("b,bij->ij", c, weights))
            place += 1
    return model


@pytest.mark.parametrize(("blocks", "after"), [(1, [3]), (2, [1, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_with_open_gates_it_is_a_deeper_model(blocks: int, after: list[int]) -> None:
    model, found = grown(4, blocks)
    assert sorted(name for name in found if name.endswith("gate")) == [f"blocks.{n}.growth.gate" for n in after]
    with torch.no_grad():
        expected = deeper(4, after, found)(images())
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
        assert (expected - vit(4)(images())).norm() > 0.1 * expected.norm()


def test_a_gate_is_between_the_two() -> None:
    model, found = grown(2, 1)
    with torch.no_grad():
        long, short = deeper(2, [1], found), vit(2)
        before = short.forward_intermediates(images(), intermediates_only=True, norm=False, output_fmt="NCHW")[-1]
        after = long.forward_intermediates(images(), intermediates_only=True, norm=False, output_fmt="NCHW")[-1]
        model.get_parameter("blocks.1.growth.gate").fill_(0.25)
        mixed = model.forward_intermediates(images(), intermediates_only=True, norm=False, output_fmt="NCHW")[-1]
    torch.testing.assert_close(mixed, before + 0.25 * (after - before), rtol=1e-4, atol=1e-5)


def test_blocks_of_a_stage_take_from_their_stage() -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)  # stages of 2, 2, 6 and 2 blocks
        trained = inject_adapter(model, Growth(blocks=12))
    sizes = {name: model.get_parameter(path).numel() for name, path in trained.items() if name.endswith("attn_qkv")}
    assert sizes == {
        f"layers.{stage}.blocks.{block}.growth.coefficients.attn_qkv": count
        for stage, count in enumerate((2, 2, 6, 2))
        for block in range(count)
    }


def test_a_new_block_that_fails_leaves_the_weights_of_the_old_one() -> None:
    model, found = grown(2, 1)
    block = model.get_submodule("blocks.1")
    before = block.get_submodule("mlp.fc1").weight.clone()

    def fails_the_second_time(*_: object) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    calls: list[int] = []
    block.get_submodule("mlp").register_forward_pre_hook(fails_the_second_time)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(images())
    assert torch.equal(block.get_submodule("mlp.fc1").weight, before)
    assert found["blocks.1.growth.gate"] == 1


class Twin(nn.Module):
    """A block whose output is no tensor, as those of MViT and TNT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


class Wider(nn.Module):
    """A block that takes one channel, and makes three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


class Listed(nn.ModuleDict):
    """A container that runs what is in it, as the blocks of DenseNet."""

    def __init__(self) -> None:
        super().__init__({"first": nn.Conv2d(3, 3, 1), "second": nn.Conv2d(3, 3, 1)})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.values():
            x = module(x)
        return x


@pytest.mark.parametrize(
    ("block", "shape", "got"),
    [
        (Twin, (2, 3, 32, 32), "got body.0, which makes a tuple of [2, 3, 32, 32]"),
        (Wider, (2, 1, 32, 32), "got body.0, which makes [2, 3, 32, 32] of [2, 1, 32, 32]"),
        (Listed, (2, 3, 32, 32), "got body.0, a Listed that runs its modules in a way of its own"),
    ],
)
def test_blocks_that_cannot_be_repeated_are_named(block: type[nn.Module], shape: tuple[int, ...], got: str) -> None:
    network = nn.ModuleDict({"stem": nn.Identity(), "body": nn.Sequential(block(), block())})
    with pytest.raises(UnfitError) as error:
        inject_adapter(network, Growth(blocks=2))
        network.get_submodule("body")(torch.zeros(shape))
    assert_one_line(error, "adapter: growth needs blocks that keep the shape of their input", got)


def test_a_sequence_of_layers_is_followed_by_a_new_one() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)) for _ in range(2)))
    network = nn.ModuleDict({"stem": nn.Identity(), "body": body})
    before = body(images())
    once = body[0](images())
    trained = inject_adapter(network, Growth(blocks=2))
    assert torch.equal(body(images()), before)
    with torch.no_grad():
        network.get_parameter(trained["body.0.growth.gate"]).fill_(1)
    twice = body[0][2](torch.relu(body[0][0](once)))
    torch.testing.assert_close(body[0](images()), twice)


@pytest.mark.parametrize("backbone", ["mvitv2_tiny", "tnt_s_patch16_224", "hrnet_w18_small"])
def test_blocks_that_cannot_be_repeated_are_known_before_the_run(backbone: str) -> None:
    model = ModelConfig(backbone=backbone, method="frozen", pretrained=False)
    with pytest.raises(UnfitError) as error:
        check_model(model, RecastConfig(targets=["*"]), MimicryConfig(name="closed_form"), {"name": "growth"})
    assert_one_line(error, "adapter: growth needs blocks that keep the shape of their input")


def test_blocks_that_change_the_shape_are_named() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = nn.Sequential(Halving(), Halving())
    outer = nn.ModuleDict({"stem": nn.Identity(), "body": model})
    inject_adapter(outer, Growth(blocks=1))
    with pytest.raises(UserError) as error:
        model(images())
    assert_one_line(error, "adapter: growth needs blocks that keep the shape of their input, got body.1")
