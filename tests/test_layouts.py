"""Layouts of maps in memory: chosen by trial, kept, and of no effect on what is computed."""

import copy
from functools import partial

import pytest
import torch

import layerwise
from layerwise import layouts
from layerwise.allocator import keep_freed_memory
from layerwise.errors import InvalidInput
from layerwise.layouts import CACHE, lay_out
from layerwise.learner import Learner


def make_learner(model: torch.nn.Module | None = None, **options) -> Learner:
    torch.manual_seed(0)
    model = model or layerwise.create_model("resnet18", hierarchy=(1, 1, 1, 1), width=0.125, image_size=8)
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    return layerwise.localize(model, torch.zeros(2, 3, 8, 8), 10, optimizer=adam, seed=0, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("loss", ["predsim", "predsim-lite", "pred"])
def test_a_layout_does_not_change_what_is_learned(loss: str) -> None:
    one, other = make_learner(loss=loss), make_learner(loss=loss)
    lay_out(other, "channels-last")
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
    lay_out(other, "channels-last")
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for unit in other.units:
        for parameter, state in unit.optimizer.state.items():
            assert state["exp_avg"].stride() == parameter.stride()
    assert one.step(*batch()).losses == pytest.approx(other.step(*batch()).losses, rel=1e-3)
    for own, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-4)


def test_auto_takes_what_a_trial_finds_faster_and_tries_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    slow = {torch.contiguous_format: 1.0, torch.channels_last: 0.5}
    calls = []

    def timed(unit, carried, targets) -> float:
        calls.append(unit.name)
        return slow[unit.memory_format]

    def deep() -> Learner:
        return make_learner(layerwise.create_model("resnet18", hierarchy=(3, 1, 1, 1), width=0.125, image_size=8))

    monkeypatch.setattr(layouts, "timed", timed)
    learner = deep()
    chosen = lay_out(learner, "auto")
    assert set(chosen) == {"channels-last"}
    assert len(set(calls)) < len(learner.units)  # units that are built alike are tried once
    calls.clear()
    slow[torch.channels_last] = 2.0
    assert lay_out(deep(), "auto") == chosen
    assert not calls
    monkeypatch.setenv(CACHE, str(tmp_path / "other"))
    assert set(lay_out(deep(), "auto")) == {"contiguous"}


def test_a_small_advantage_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(layouts, "timed", lambda unit, *_: 1.0 if unit.memory_format is torch.contiguous_format else 0.99)
    assert set(lay_out(make_learner(), "auto")) == {"contiguous"}


def test_a_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    learner = make_learner()
    before = copy.deepcopy(learner.state_dict())
    state = torch.get_rng_state()
    layouts.fastest(learner)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before["model"][name]) for name, value in learner.model.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.model.parameters())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_cache_is_made_anew(content: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    (tmp_path / "layouts.json").write_text(content)
    assert len(lay_out(make_learner(), "auto")) == len(make_learner().units)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "folder"))
    assert len(lay_out(make_learner(), "auto")) == len(make_learner().units)


def test_what_was_chosen_before_is_chosen_again() -> None:
    learner = make_learner()
    known = ["channels-last", "contiguous"] * 5
    assert lay_out(learner, "auto", known[: len(learner.units)]) == known[: len(learner.units)]


@pytest.mark.parametrize("layout", ["channels-last", "auto"])
def test_a_narrow_strided_convolution_stays_contiguous(layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """In the other order, a CPU with AVX2 alone writes past the memory of its weight's gradient."""
    monkeypatch.setattr(layouts, "trial", lambda unit, carried, num_classes: "channels-last")
    monkeypatch.setenv(CACHE, str(tmp_path))
    narrow = layerwise.create_model("resnet18", hierarchy=(1, 1, 1, 1), width=0.0625, image_size=8)
    learners = [make_learner(model) for model in (narrow, copy.deepcopy(narrow))]
    for learner in learners:
        chosen = lay_out(learner, layout)
        shortcut = [unit.name for unit in learner.units].index("stages.1.0.conv2")  # 4 to 8 channels; those behind it are wider
        assert [name for index, name in enumerate(chosen) if index != shortcut] == ["channels-last"] * 9
        assert chosen[shortcut] == "contiguous"
    for _ in range(3):
        assert learners[0].step(*batch()).losses == learners[1].step(*batch()).losses
    for one, other in zip(*(learner.model.parameters() for learner in learners), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(InvalidInput, match="unknown layout 'nhwc'"):
        lay_out(make_learner(), "nhwc")


def test_memory_can_be_kept() -> None:
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
