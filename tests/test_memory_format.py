"""Memory formats: chosen by a rule or by trial, and of no effect on what is computed."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import layerwise
from layerwise.core import memory_format as formats
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.errors import InvalidInput
from layerwise.utils.allocator import keep_freed_memory


def make_learner(model: torch.nn.Module | None = None, **options) -> Learner:
    torch.manual_seed(0)
    model = model or layerwise.create_model(
        "resnet18", hierarchy=(1, 1, 1, 1), width=0.125, image_size=8
    )
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    options = {"output_layer": "separate", "memory_format": None, "optimizer": adam} | options
    return layerwise.localize(model, torch.zeros(2, 3, 8, 8), 10, seed=0, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("loss", ["predsim", "predsim-lite", "pred"])
def test_a_memory_format_does_not_change_what_is_learned(loss: str) -> None:
    one, other = make_learner(loss=loss), make_learner(loss=loss)
    set_memory_format(other, "channels-last")
    for _ in range(3):
        losses, other_losses = one.step(*batch()).losses, other.step(*batch()).losses
        assert losses == pytest.approx(other_losses, rel=1e-3)
    assert one.model.state_dict().keys() == other.model.state_dict().keys()
    weight = other.units[1].parameters()[0]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_optimizers_state_lies_as_its_parameters_do_also_when_loaded() -> None:
    """Fused optimizers read weights and moments in the order of memory."""
    one, other = make_learner(), make_learner()
    one.step(*batch())
    set_memory_format(other, "channels-last")
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for unit in other.units:
        for parameter, state in unit.optimizer.state.items():
            assert state["exp_avg"].stride() == parameter.stride()
    assert one.step(*batch()).losses == pytest.approx(other.step(*batch()).losses, rel=1e-3)
    for own, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-4)


def test_the_rule_needs_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "timed", None)
    assert set(set_memory_format(make_learner(), "auto")) == {"channels-last"}
    [first, *others] = set_memory_format(make_learner(amp=torch.bfloat16))
    assert first == "contiguous"  # it reads the image
    assert set(others) == {"channels-last"}


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, "channels-last"), (0.99, "contiguous"), (2.0, "contiguous")]
)
def test_a_trial_takes_the_faster_format(
    seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small advantage is none."""
    needed = {torch.contiguous_format: 1.0, torch.channels_last: seconds}
    monkeypatch.setattr(formats, "timed", lambda unit, *_: needed[unit.memory_format])
    assert set(set_memory_format(make_learner(), "trial")) == {expected}


def test_a_trial_leaves_no_trace() -> None:
    learner = make_learner()
    before = copy.deepcopy(learner.state_dict())
    state = torch.get_rng_state()
    assert set(formats.memory_formats(learner, "trial")) <= set(formats.FORMATS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(value, before["model"][name])
        for name, value in learner.model.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_the_name_of_before_still_works() -> None:
    assert layerwise.lay_out is layerwise.set_memory_format


@pytest.mark.parametrize("choice", ["auto", "trial"])
def test_what_was_chosen_before_is_chosen_again(choice: str) -> None:
    learner = make_learner()
    before = (["channels-last", "contiguous"] * 5)[: len(learner.units)]
    assert set_memory_format(learner, choice, before) == before
    with pytest.raises(
        InvalidInput, match=r"names formats of 9 units, and the run has 10\. Restore run\.json"
    ):
        set_memory_format(learner, choice, before[1:])


@pytest.mark.parametrize("choice", ["channels-last", "auto", "trial"])
def test_a_narrow_strided_convolution_stays_contiguous(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the other order, a CPU with AVX2 alone writes past the memory of its weight's gradient."""
    monkeypatch.setattr(formats, "trial", lambda *given: "channels-last")
    narrow = layerwise.create_model("resnet18", hierarchy=(1, 1, 1, 1), width=0.0625, image_size=8)
    learners = [make_learner(model) for model in (narrow, copy.deepcopy(narrow))]
    for learner in learners:
        chosen = set_memory_format(learner, choice)
        # 4 to 8 channels; those behind it are wider
        shortcut = [unit.name for unit in learner.units].index("stages.1.0.conv2")
        assert [name for index, name in enumerate(chosen) if index != shortcut] == [
            "channels-last"
        ] * 9
        assert chosen[shortcut] == "contiguous"
    for _ in range(3):
        assert learners[0].step(*batch()).losses == learners[1].step(*batch()).losses
    for one, other in zip(*(learner.model.parameters() for learner in learners), strict=True):
        assert torch.equal(one, other)


class OwnGroupNorm(torch.nn.GroupNorm):
    """A norm that is traced into, down to PyTorch's function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PreNorm(torch.nn.Module):
    """A network with a residual block that begins with a norm."""

    def __init__(self, norm: type[torch.nn.GroupNorm]) -> None:
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 8, 3), norm(2, 8)
        self.conv, self.head = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.conv(self.norm(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm, OwnGroupNorm])
@pytest.mark.parametrize("asked", ["auto", "channels-last"])
def test_units_with_group_normalisation_stay_contiguous(
    norm: type[torch.nn.GroupNorm], asked: str
) -> None:
    """PyTorch's backward pass would end the process where nothing before it learns."""
    images = torch.rand(4, 3, 8, 8)
    local = layerwise.localize(
        PreNorm(norm), images, 10, "pred", "block", memory_format=asked, output_layer="separate"
    )
    assert set_memory_format(local, asked) == ["channels-last", "contiguous", "channels-last"]
    local.step(images, torch.arange(4))


class StandardizedConvolution(torch.nn.Conv2d):
    """A convolution that is traced into, down to PyTorch's function of a computed weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    ("stride", "chosen"), [(1, "channels-last"), ((1, 1), "channels-last"), (2, "contiguous")]
)
def test_a_strided_convolution_by_its_function_stays_contiguous(
    stride: int | tuple[int, int], chosen: str
) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        StandardizedConvolution(4, 8, 1, stride),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(10),
    )
    images = torch.rand(4, 3, 8, 8)
    model(images)
    options = {"loss": "pred", "optimizer": partial(torch.optim.SGD, lr=0.1), "seed": 0}
    exact = layerwise.localize(
        copy.deepcopy(model).double(), images.double(), 10, memory_format=None, **options
    )
    local = layerwise.localize(model, images, 10, **options)
    assert set_memory_format(local, "auto")[1] == chosen
    local.step(images, torch.arange(4))
    exact.step(images.double(), torch.arange(4))
    for (name, one), other in zip(model.named_parameters(), exact.model.parameters(), strict=True):
        torch.testing.assert_close(one, other.float(), msg=name)


def test_an_unknown_memory_format_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Cannot use memory format 'nhwc': it is unknown"):
        set_memory_format(make_learner(), "nhwc")


def test_memory_can_be_kept() -> None:
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
