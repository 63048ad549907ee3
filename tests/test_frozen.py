"""Layers frozen, thawed and replaced after localize: each learns, stays, or is refused in words."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import layerwise
from layerwise.core.cuda_graphs import settings_of
from layerwise.errors import InvalidInput
from layerwise.rules import RULES
from tests.helpers import CLASSES, digits, learner, network, same_weights, ticks

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=drawn), torch.arange(8) % CLASSES
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, weight_decay=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused momentum": lambda weights: torch.optim.SGD(
        weights, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True
    ),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1),
    "fused adam": lambda weights: torch.optim.Adam(weights, lr=1e-3, fused=True),
    "rate in a tensor": lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(1e-3)),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-4, momentum=0.9),
}


def weights_of(module: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.parameters()]


def learned(module: nn.Module, before: list[Tensor]) -> list[bool]:
    return [
        not torch.equal(weight, old)
        for weight, old in zip(module.parameters(), before, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("plain", optimizer) for optimizer in OPTIMIZERS]
    + [
        (name, optimizer)
        for name in ("vgg8b", "resnet18")
        for optimizer in ("momentum", "fused momentum", "fused adam")
    ],
)
def test_every_layer_thaws_and_freezes(name: str, optimizer: str) -> None:
    """Each weighted layer alone, the last one too, frozen from the start, thawed, frozen again."""
    layers = [
        layer
        for layer, module in network(name).named_modules()
        if not list(module.children()) and list(module.parameters())
    ]
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        model = network(name)
        module = model.get_submodule(layer)
        module.requires_grad_(False)
        local = layerwise.localize(
            model, IMAGES, CLASSES, loss="pred", seed=0, optimizer=OPTIMIZERS[optimizer]
        )
        for trainable in (False, True, False, True):
            module.requires_grad_(trainable)
            before = weights_of(module)
            for _ in range(2):
                local.step(IMAGES, LABELS)
            assert set(learned(module, before)) == {trainable}, layer
            assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("optimizer", sorted({*OPTIMIZERS} - {"fused momentum"}))
def test_one_unit_thaws_as_in_the_usual_loop(optimizer: str) -> None:
    """To the bit, also in momentum, weight decay and Adam's count of steps."""
    plain, model = network("branches"), network("branches")
    local = layerwise.localize(
        model, IMAGES, CLASSES, at=1, memory_format=None, optimizer=OPTIMIZERS[optimizer]
    )
    usual = OPTIMIZERS[optimizer](list(plain.parameters()))
    for frozen in (["stem"], [], ["left", "gate"], ["out"], []):
        for each in (plain, model):
            each.requires_grad_(True)
            for name in frozen:
                each.get_submodule(name).requires_grad_(False)
        for _ in range(2):
            usual.zero_grad()
            F.cross_entropy(plain(IMAGES), LABELS).backward()
            usual.step()
            local.step(IMAGES, LABELS)
        assert same_weights(plain, model)


def test_weights_thawed_into_fused_momentum_begin_from_none() -> None:
    fused, single = (
        learner("plain", optimizer=lambda w, f=f: torch.optim.SGD(w, 0.1, momentum=0.9, fused=f))
        for f in (True, False)
    )
    for local in (fused, single):
        for trainable in (False, True):
            local.model.conv2.weight.requires_grad_(trainable)
            for _ in range(2):
                local.step(IMAGES, LABELS)
    for weight, expected in zip(fused.model.parameters(), single.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", ["layer", 1])
@pytest.mark.parametrize("output_layer", ["joined", "separate"])
def test_the_whole_network_may_be_frozen(output_layer: str, at: Any) -> None:
    local = layerwise.localize(
        network("plain"), IMAGES, CLASSES, loss="pred", at=at, output_layer=output_layer
    )
    local.step(IMAGES, LABELS)
    local.model.requires_grad_(False)
    before, heads = weights_of(local.model), [weights_of(unit.loss) for unit in local.units]
    local.step(IMAGES, LABELS)
    assert not any(learned(local.model, before))
    for unit, head in zip(local.units, heads, strict=True):
        assert all(learned(unit.loss, head))  # heads go on, as probes
    local.model.requires_grad_(True)
    local.step(IMAGES, LABELS)
    assert all(learned(local.model, before))


@pytest.mark.parametrize("rule", RULES)
def test_rules_follow(rule: str) -> None:
    """A network frozen as a whole when it was cut, with an output layer that is thawed later."""
    data, model = digits(), network("plain").requires_grad_(False)
    local = layerwise.localize(model, IMAGES, CLASSES, at=RULES[rule].at or "layer", seed=0)
    before = weights_of(model)
    ticks(rule, local, data.train, epochs=1)
    assert not any(learned(model, before))
    model.out.requires_grad_(True)
    ticks(rule, local, data.train, epochs=1)
    assert learned(model, before) == [False] * 4 + [True] * 2


def test_a_recording_depends_on_what_learns() -> None:
    local = learner("plain")
    settings = [settings_of(local.units)]
    for change in (
        lambda: local.model.out.requires_grad_(False),
        lambda: setattr(local.model.conv1.weight, "data", torch.zeros(6, 1, 3, 3)),
        lambda: setattr(local.units[0], "optimizer", torch.optim.SGD(local.units[0].weights())),
    ):
        assert settings_of(local.units) == settings[-1]
        change()
        settings.append(settings_of(local.units))
        assert settings[-1] != settings[-2]


def replace_head(local: layerwise.Learner) -> None:
    local.units[0].loss.classifier = nn.Linear(96, CLASSES)


REPLACEMENTS: dict[str, tuple[Callable[[layerwise.Learner], Any], str]] = {
    "weight": (
        lambda local: setattr(local.model.conv1, "weight", nn.Parameter(torch.zeros(6, 1, 3, 3))),
        "network's 'conv1.weight' was replaced after localize",
    ),
    "bias left out": (
        lambda local: local.model.conv2.register_parameter("bias", None),
        "'conv2.bias'",
    ),
    "layer": (
        lambda local: setattr(local.model, "out", nn.Linear(96, CLASSES)),
        "'out' was replaced",
    ),
    "layer taken out": (lambda local: delattr(local.model, "conv2"), "'conv2' was replaced"),
    "tied": (lambda local: setattr(local.model.conv2, "bias", local.model.conv1.bias), "bias"),
    "pruned": (lambda local: prune.random_unstructured(local.model.out, "weight", 0.5), "'out.w"),
    "weight norm": (lambda local: parametrizations.weight_norm(local.model.out), "'out.weight'"),
    "orthogonal": (lambda local: parametrizations.orthogonal(local.model.out), "'out.weight'"),
    "assigned": (
        lambda local: local.model.load_state_dict(network("plain", 1).state_dict(), assign=True),
        "'conv1.weight'",
    ),
    "head": (replace_head, r"'classifier' in the loss of unit 0 \(conv1\) was replaced"),
    "loss": (
        lambda local: setattr(local.units[0], "loss", copy.deepcopy(local.units[0].loss)),
        r"optimizer of unit 0 \(conv1\) does not hold its weight 'classifier.weight'",
    ),
    "optimizer of a part": (
        lambda local: setattr(
            local.units[1], "optimizer", torch.optim.SGD([local.model.conv2.weight])
        ),
        r"optimizer of unit 1 \(conv2\) does not hold its weight 'conv2.bias'",
    ),
    "no optimizer": (lambda local: setattr(local.units[1], "optimizer", None), "'conv2.weight'"),
    "double": (lambda local: local.model.double(), "torch.float64 on cpu now, of torch.float32"),
    "one half": (lambda local: local.model.conv2.half(), "torch.float16 on cpu now"),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_what_would_stay_untrained_is_refused(replacement: str) -> None:
    local = learner("plain", "pred")
    local.step(IMAGES, LABELS)
    change, words = REPLACEMENTS[replacement]
    change(local)
    with pytest.raises(InvalidInput, match=words) as refusal:
        local.step(IMAGES, LABELS)
    assert str(refusal.value).startswith("Cannot make a step: ")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_refuses_it(rule: str) -> None:
    local = learner("plain", at=RULES[rule].at or "layer")
    REPLACEMENTS["pruned"][0](local)
    with pytest.raises(InvalidInput, match=r"'out\.weight' was replaced"):
        ticks(rule, local, digits().train, epochs=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda local: local.model.load_state_dict(network("plain", 1).state_dict()),
        lambda local: setattr(local.model.conv1.weight, "data", torch.zeros(6, 1, 3, 3)),
        lambda local: nn.init.zeros_(local.model.out.weight),
        lambda local: local.model.register_module("beside", nn.Linear(2, 2)),
        lambda local: local.model.float().cpu().zero_grad(),
        lambda local: [unit.piece.requires_grad_(True) for unit in local.units],
    ],
    ids=["load_state_dict", "data", "init", "added", "moved nowhere", "requires_grad"],
)
def test_what_changes_in_place_learns_on(change: Callable[[layerwise.Learner], Any]) -> None:
    local = learner("plain")
    local.step(IMAGES, LABELS)
    change(local)
    before = weights_of(local.model.conv2)
    local.step(IMAGES, LABELS)
    assert all(learned(local.model.conv2, before))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["pruned", "weight norm", "spectral norm"],
)
def test_weights_changed_before_localize_learn(change: Callable[[nn.Module], Any]) -> None:
    model = network("plain")
    change(model.conv2)
    local = layerwise.localize(model, IMAGES, CLASSES)
    before = weights_of(model.conv2)
    for _ in range(2):
        local.step(IMAGES, LABELS)
    assert all(learned(model.conv2, before))


def test_a_loss_without_gradient_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self, site: layerwise.Site) -> None:
            super().__init__()
            self.loss = layerwise.Pred(site)

        def forward(self, features: Tensor, targets: layerwise.Targets) -> layerwise.Evaluated:
            loss, correct = self.loss(features, targets)
            return layerwise.Evaluated(loss.detach(), correct)

    with pytest.raises(InvalidInput, match=r"unit 0 \(conv1\): its loss depends on none of its"):
        learner("plain", Detached).step(IMAGES, LABELS)


def frozen_learner(**options: Any) -> layerwise.Learner:
    """Its first layer and its output layer are frozen."""
    model = network("plain")
    model.conv1.requires_grad_(False)
    model.out.requires_grad_(False)
    return layerwise.localize(
        model, IMAGES, CLASSES, output_layer="separate", seed=0, memory_format=None, **options
    )


def test_states_of_optimizers_without_frozen_weights_are_read() -> None:
    """As they were written when optimizers were given trainable weights alone."""

    def trainable(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam([w for w in weights if w.requires_grad] or weights, fused=True)

    earlier = frozen_learner(optimizer=trainable)
    now = frozen_learner(optimizer=lambda weights: torch.optim.Adam(weights, fused=True))
    for _ in range(3):
        earlier.step(IMAGES, LABELS)
    state = copy.deepcopy(earlier.state_dict())
    state["optimizers"][-1], state["optimizer_kinds"][-1] = None, "NoneType"
    now.load_state_dict(state)
    for local in (earlier, now):
        local.step(IMAGES, LABELS)
    assert same_weights(earlier.model, now.model)
    for unit, twin in zip(earlier.units, now.units, strict=True):
        assert same_weights(unit.loss, twin.loss)
    now.model.conv1.requires_grad_(True)
    before = weights_of(now.model.conv1)
    now.step(IMAGES, LABELS)
    assert all(learned(now.model.conv1, before))


def test_a_state_goes_on_where_layers_were_thawed() -> None:
    one, another = (frozen_learner() for _ in range(2))
    for trainable in (False, True):
        one.model.conv1.requires_grad_(trainable)
        one.step(IMAGES, LABELS)
    another.load_state_dict(copy.deepcopy(one.state_dict()))
    another.model.conv1.requires_grad_(True)
    for local in (one, another):
        local.step(IMAGES, LABELS)
    assert same_weights(one.model, another.model)


def test_a_state_of_other_groups_is_refused_before_anything_is_loaded() -> None:
    grouped = frozen_learner(
        optimizer=lambda weights: torch.optim.Adam([{"params": [w]} for w in weights])
    )
    local = frozen_learner(optimizer=torch.optim.Adam)
    grouped.step(IMAGES, LABELS)
    before = copy.deepcopy(local.model)
    with pytest.raises(InvalidInput, match=r"optimizer of unit 0 \(conv1\) holds other weights"):
        local.load_state_dict(grouped.state_dict())
    assert same_weights(local.model, before)


def thawing_network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )


@pytest.mark.parametrize("on_purpose", [False, True])
def test_units_that_are_no_longer_frozen_train_in_the_networks_mode(on_purpose: bool) -> None:
    net, images, labels = thawing_network(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    layerwise.localize(net, images, 10, "pred", train_from=1).step(images, labels)
    assert not net[1].training
    if on_purpose:  # the mode of all was set since
        net.train()
        net[1].eval()
    local = layerwise.localize(net, images, 10, "pred")
    before = net[1].running_mean.clone()
    local.step(images, labels)
    assert [module.training for module in net] == [
        index != 1 or not on_purpose for index in range(8)
    ]
    assert torch.equal(net[1].running_mean, before) == on_purpose


def test_a_step_after_a_sequential_rule_trains_all_units_in_training_mode() -> None:
    local, data = learner("resnet18"), digits()
    ticks("sequential", local, data.train, epochs=1)
    images, labels = next(iter(data.train.batches(0)))
    local.step(images, labels)
    assert all(module.training for module in local.model.modules())
