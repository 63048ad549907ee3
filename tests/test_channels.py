"""Features whose channels are elsewhere than behind the batch: channels last, tokens, windows."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.feature import Feature
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.split import split
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import LOSSES, Targets, create_loss
from layerwise.losses.site import Site
from layerwise.measures.depths import network_depths
from tests import contract, helpers
from tests.helpers import CLASSES, digits
from tests.test_windows import follows_the_sum

WIDTH = 8
IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ConvNeXtLike(nn.Module):
    """Maps (B, C, H, W) that are turned inside of blocks, and whose norms turn them too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
            self.gamma = nn.Parameter(torch.full((WIDTH, 1, 1), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
            return x + self.gamma * y

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.one, self.two = self.Block(), self.Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.norm(self.two(self.one(x)).mean((2, 3))))


class Windows(nn.Module):
    """Attention within windows of 2×2 pixels, which are folded into the batch."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.width, self.shift = width, shift
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(-1, height // 2, 2, width // 2, 2, self.width)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, self.width)
        q, k, v = self.qkv(y).view(-1, 4, 3, 2, self.width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, self.width)
        y = self.proj(y).view(-1, height // 2, width // 2, 2, 2, self.width)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, self.width)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class Merge(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, ::2], x[:, 1::2]
        x = torch.cat([part for row in rows for part in (row[:, :, ::2], row[:, :, 1::2])], -1)
        return self.reduce(self.norm(x))


class SwinLike(nn.Module):
    """Maps (B, H, W, C), windows, and patches that are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.first = nn.Sequential(Windows(WIDTH, 0), Mlp(WIDTH), Windows(WIDTH, 1), Mlp(WIDTH))
        self.merge = Merge(WIDTH)
        self.second = nn.Sequential(Windows(2 * WIDTH, 0), Mlp(2 * WIDTH))
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x).permute(0, 2, 3, 1))
        return self.head(self.norm(self.second(self.merge(x))).mean((1, 2)))


class Attention(nn.Module):
    """Attention with several heads, whose channels are on no single axis on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count = x.shape[0], x.shape[1]
        qkv = self.qkv(self.norm(x)).reshape(batch, count, 3, 2, WIDTH // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).reshape(batch, count, WIDTH))


class ViTLike(nn.Module):
    """Tokens (B, N, C) with a class token; blocks by hand and PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 17, WIDTH) / 10)
        self.attention, self.mlp = Attention(), Mlp(WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layer(self.mlp(self.attention(x))))[:, 0])


class MixerLike(nn.Module):
    """Tokens (B, N, C) that are turned to be mixed over N, and are added in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(1, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        self.mlp, self.head = Mlp(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2) + x
        return self.head(self.mlp(x).mean(1))


class Sequences(nn.Module):
    """Tokens (N, B, C) inside of attention, or everywhere behind the first layer."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.embed = nn.Conv2d(1, WIDTH, 2, 2)
        self.attention, self.mlp = nn.MultiheadAttention(WIDTH, 2), Mlp(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.mlp(x if self.everywhere else x.transpose(0, 1))
        return self.head(x.mean(0 if self.everywhere else 1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "convnext-like": ConvNeXtLike,
    "swin-like": SwinLike,
    "vit-like": ViTLike,
    "mixer-like": MixerLike,
}
CUTS: list[Any] = ["layer", "block", 3]
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in KINDS.items():
        monkeypatch.setitem(helpers.NETWORKS, name, make)


def make(name: str, loss: Any = "pred", at: Any = "block", **options: Any) -> Learner:
    return helpers.learner(name, loss, at, output_layer="joined", **options)


def layouts(learner: Learner) -> dict[str, str]:
    return {unit.name: str(unit.feature) for unit in learner.units[:-1]}


# ---- where channels and cuts are ----

MAPS, SMALL, TOKENS = "8×4×4", "4×4×8, channels last", "17×8, channels last"
WIDE, MERGED = "4×4×16, channels last", "2×2×16, channels last"
LAYOUTS = {
    ("convnext-like", "block"): {"stem": MAPS, "one": MAPS},
    ("convnext-like", "layer"): {
        "stem": MAPS,
        **{"one.depthwise": SMALL, "one.up": WIDE, "one.down": MAPS},
        **{"two.depthwise": SMALL, "two.up": WIDE},
    },
    ("swin-like", "block"): {
        **{"embed": SMALL, "first.0": SMALL, "first.1": SMALL, "first.2": SMALL},
        **{"first.3": "2×2×32, channels last", "merge.reduce": MERGED, "second.0": MERGED},
    },
    ("vit-like", "block"): {"embed": TOKENS, "attention": TOKENS, "mlp": TOKENS},
    ("vit-like", "layer"): {
        **{"embed": TOKENS, "attention.qkv": TOKENS, "attention.proj": TOKENS},
        **{"mlp.up": "17×16, channels last", "mlp.down": TOKENS},
    },
    ("mixer-like", "layer"): {
        "embed": "8×16",
        "up": "8×12, channels last",
        "down": "16×8, channels last",
        "mlp.up": "16×16, channels last",
    },
}


@pytest.mark.parametrize(("name", "at"), LAYOUTS, ids=str)
def test_layouts(name: str, at: str) -> None:
    local = make(name, at=at)
    assert layouts(local) == LAYOUTS[name, at]
    assert all(row in str(local) for row in LAYOUTS[name, at].values())


def test_networks_of_maps_and_vectors_are_cut_as_without_a_sample() -> None:
    for name in ("vgg8b", "resnet18", *helpers.FOREIGN):
        for at in ("layer", "block"):
            model = helpers.network(name)
            with_sample, without = split(model, at, IMAGES), split(model, at)
            assert with_sample.names == without.names
            codes = [[piece.code for piece in chain.pieces] for chain in (with_sample, without)]
            assert codes[0] == codes[1]
            assert set(with_sample.channels) == {1}


def test_a_layer_inside_of_windows_shares_the_unit_of_the_next() -> None:
    names = [unit.name for unit in make("swin-like", at="layer").units]
    assert names[:3] == ["embed", "first.0", "first.1.up"]
    with pytest.raises(CannotSplit, match=r"'first.0.qkv'.* windows .* such as 'first.0.proj'"):
        split(SwinLike(), ["first.0.qkv"], IMAGES)
    assert split(SwinLike(), ["first.0.proj"], IMAGES).names[0] == "embed..first.0.proj"


def test_the_batch_behind_another_axis() -> None:
    local = localize(Sequences(everywhere=False), IMAGES, CLASSES, "pred", at="layer")
    last = "16×8, channels last"
    wide = "16×16, channels last"
    assert layouts(local) == {"embed": MAPS, "attention": last, "mlp.up": wide}
    for at in CUTS[:2]:
        with pytest.raises(CannotSplit, match=r"behind 'attention': .* \(16, 2, 8\) for 2 images"):
            localize(Sequences(everywhere=True), IMAGES, CLASSES, "pred", at=at)
    local = localize(Sequences(everywhere=True), IMAGES, CLASSES, "pred", at=["embed"])
    assert layouts(local) == {"embed": MAPS}


class Opaque(nn.Module):
    """Channels in an axis that no layer shows: (B, N, C, 3) behind a module that is kept whole."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 5, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bp,pnct->bnct", x.flatten(1)[:, :16], self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.own, self.head = self.Own(), nn.Linear(5 * 8 * 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(x).flatten(1))


def opaque(**options: Any) -> Learner:
    cut = {"at": "layer", "output_layer": "separate", "leaves": ["own"]}
    return localize(Opaque(), IMAGES, CLASSES, "pred", **cut, **options)


def test_what_no_layer_shows_can_be_said() -> None:
    assert opaque().units[0].feature == Feature((5, 8, 3), 1)
    assert opaque(channels={"own": 2}).units[0].feature.read == (8, 5, 3)
    assert opaque(channels={"own": -1}).units[0].feature.read == (3, 5, 8)
    assert "5×8×3, channels in axis 2" in str(opaque(channels={"own": 2}))
    for channels, words in (
        ({"own": 0}, r"channels= of unit 'own': .* \(B, 5, 8, 3\)\. Give an axis from 1 to 3"),
        ({"own": 4}, "from 1 to 3"),
        ({"own": -4}, "from 1 to 3"),
        ({"own": True}, "from 1 to 3"),
        ({"on": 1}, "unit in channels= 'on': it is unknown"),
        (-1, "channels=-1: it is not a dictionary"),
    ):
        with pytest.raises(InvalidInput, match=words):
            opaque(channels=channels)


# ---- what losses read ----


@pytest.mark.parametrize(
    ("shape", "channels", "read"),
    [
        ((5,), 1, (5,)),
        ((5, 3, 2), 1, (5, 3, 2)),
        ((3, 2, 5), 3, (5, 3, 2)),
        ((7, 5), 2, (5, 7, 1)),
        ((5, 7), 1, (5, 7, 1)),
        ((3, 5, 2), 2, (5, 3, 2)),
    ],
)
def test_turned_features(shape: tuple[int, ...], channels: int, read: tuple[int, ...]) -> None:
    feature, tensor = Feature(shape, channels), torch.rand(4, *shape)
    turned = feature.turned(tensor)
    assert feature.read == turned.shape[1:] == read
    assert (turned is tensor) == feature.as_it_is
    assert torch.equal(feature.restored(turned), tensor)
    assert turned.data_ptr() == tensor.data_ptr()  # a view
    index = torch.arange(4 * torch.Size(shape).numel()).reshape(4, *shape)
    by_hand = index.unbind(channels)[2]  # the third channel
    assert torch.equal(feature.turned(index)[:, 2].flatten(), by_hand.flatten())


def by_hand(layout: str, feature: Tensor) -> Tensor:
    """What a loss should read, from the description of a layout."""
    if feature.dim() == 3:
        return (feature.transpose(1, 2) if "last" in layout else feature)[..., None]
    return feature.permute(0, 3, 1, 2) if "last" in layout else feature


@pytest.mark.parametrize("loss", ["pred", "predsim"])
@pytest.mark.parametrize(("name", "at"), LAYOUTS, ids=str)
def test_losses_are_those_of_features_turned_by_hand(name: str, at: str, loss: str) -> None:
    local = make(name, loss, at)
    local.model.eval()
    targets = Targets(LABELS, CLASSES, IMAGES)
    activations: tuple[Any, ...] = (IMAGES,)
    for unit in local.units[:-1]:
        for weight in unit.loss.parameters():  # classifiers start at zero
            nn.init.normal_(weight)
        passed, (value, _) = unit.evaluate(activations, targets)
        turned = by_hand(LAYOUTS[name, at][unit.name], passed[0])
        assert torch.equal(value, unit.loss(turned, targets).loss)
        activations = passed


# ---- promises ----


@pytest.mark.parametrize("at", CUTS)
@every_kind
def test_units_compose_the_network(name: str, at: Any) -> None:
    for training in (True, False):
        contract.units_compose_the_network(name, at, training)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("convnext-like", "predsim"), ("swin-like", "pred"), ("vit-like", "predsim")],
)
def test_no_gradient_crosses_a_border(name: str, loss: str) -> None:
    contract.no_gradient_crosses_a_border(name, loss)


@pytest.mark.parametrize(("name", "loss"), [("swin-like", "pred"), ("vit-like", "predsim")])
def test_resumed_is_uninterrupted(name: str, loss: str) -> None:
    contract.resumed_is_uninterrupted(name, "sequential", loss)


def test_cached_features_change_nothing(tmp_path: Path) -> None:
    contract.cached_features_change_nothing("convnext-like", "predsim", tmp_path)


# units into and out of which features of one shape pass, as losses read them
CARRYING = {
    "swin-like": {"first.0", "first.1", "first.2", "second.0"},
    "vit-like": {"attention", "mlp"},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CARRYING)
def test_every_loss_and_term_reads_every_layout(name: str, loss: str) -> None:
    local = make(name, loss, transport=0.1, own_input=0.1)
    result = local.step(IMAGES, LABELS)
    assert all(value == value for value in result.losses)
    carrying = {unit.name for unit in local.units[:-1] if "transport" in unit.loss.applied()}
    assert carrying == CARRYING[name]


@pytest.mark.parametrize("loss", ["pred", "auglocal"])
@pytest.mark.parametrize("name", ["swin-like", "vit-like"])
def test_windows_of_units_reach_through(name: str, loss: str) -> None:
    follows_the_sum(
        localize(
            KINDS[name](),
            IMAGES,
            CLASSES,
            loss,
            "block",
            seed=0,
            check=False,
            span=2,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1),
            own_input=0.5,
        ),
        2,
    )


def test_forced_kernels() -> None:
    for name in ("swin-like", "vit-like"):
        contract.forced_kernels_give_the_same_gradients(name, "predsim-lite", None, 1e-4)


def test_measures_read_features_as_losses_do() -> None:
    for name, read in (("vit-like", (WIDTH, 17, 1)), ("swin-like", (WIDTH, 4, 4))):
        depths = network_depths(KINDS[name](), "block", IMAGES)
        local = make(name)
        assert depths.units[0].feature.read == read == local.units[0].feature.read


def test_only_maps_are_brought_into_a_memory_format() -> None:
    local = make("swin-like", memory_format="channels-last")
    chosen = [unit.memory_format for unit in local.units]
    assert chosen == [torch.channels_last] + [torch.contiguous_format] * (len(chosen) - 1)
    again = copy.deepcopy(make("swin-like"))
    again.step(IMAGES, LABELS)
    local.step(IMAGES, LABELS)
    for ours, theirs in zip(local.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_five_axes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="the loss reads maps"):
        create_loss("pred", Site(0, 2, Feature((2, 3, 4, 5), 4).read, CLASSES))


@pytest.mark.parametrize("name", ["convnext-like", "swin-like"])
def test_digits_are_learned(name: str) -> None:
    data = digits(train_images=400, batch_size=20)
    local = make(name, "pred", optimizer=lambda weights: torch.optim.Adam(weights, lr=1e-2))

    def accuracy() -> float:
        local.model.eval()
        batches = data.test.in_order()
        with torch.no_grad():
            correct = sum(int((local.model(x).argmax(1) == y).sum()) for x, y in batches)
        return correct / len(data.test.labels)

    assert accuracy() < 0.25
    helpers.ticks("simultaneous", local, data.train, epochs=8)
    assert accuracy() > 0.35


def test_tokens_are_classified_by_statistics_whatever_their_scale() -> None:
    local = make("vit-like")
    heads = [unit.loss for unit in local.units[:-1]]
    assert all(head.classifier.in_features == 2 * WIDTH for head in heads)
    tokens = torch.randn(6, WIDTH, 17, 1)
    nn.init.normal_(heads[0].classifier.weight)
    targets = Targets(LABELS, CLASSES)
    value, shuffled, larger = (
        heads[0](features, targets).loss
        for features in (tokens, tokens[:, :, torch.randperm(17)], 9 * tokens)
    )
    torch.testing.assert_close(shuffled, value)
    torch.testing.assert_close(larger, value, atol=1e-3, rtol=1e-3)
    for count in (1, 17):  # a single position, or alike ones: the gradient is finite
        alike = torch.ones(6, WIDTH, count, 1, requires_grad=True)
        heads[0](alike, targets).loss.backward()
        assert alike.grad.isfinite().all()


def test_heads_know_whether_the_network_normalises_layers() -> None:
    """As ConvNeXt and Swin do before their classifiers; a network of convolutions does not."""
    for name, expected, options in (
        ("convnext-like", True, {}),
        ("swin-like", True, {}),
        ("swin-like", True, {"train_from": 1}),
        ("plain", False, {}),
    ):
        local = make(name, **options)
        norms = [
            module for module in local.units[0].loss.modules() if isinstance(module, nn.BatchNorm1d)
        ]
        assert bool(norms) == expected
