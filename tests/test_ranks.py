"""Ranks agree before anything is written, and end together."""

import os
import re
import signal
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from layerwise.cli import main
from layerwise.distributed import (
    agree,
    decided_by_first,
    gathered,
    share,
    together,
    world,
)
from layerwise.distributed.meeting import ASKS, common_store
from layerwise.distributed.messages import described, entries_of, read_description
from layerwise.distributed.world import joined
from layerwise.errors import InvalidInput, LostRank
from tests.helpers import learner, same_weights
from tests.ranks import on_ranks


def who() -> tuple[int, int, list[int]]:
    return world().rank, world().size, gathered(world().rank * 10)


def test_ranks_know_each_other() -> None:
    assert on_ranks(who) == [(0, 2, [0, 10]), (1, 2, [0, 10])]
    assert who() == (0, 1, [0])


def test_tensors_of_one_place_and_other_types_travel_apart() -> None:
    numbers = torch.ones(2, 3)
    entries = entries_of([numbers, numbers.view(torch.int32), numbers, torch.empty(0, 2)])
    entries += entries_of([torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64)])
    assert [entry.same_as for entry in entries] == [None, None, 0, None, None, None]


class Size(NamedTuple):
    height: int
    width: int


def test_values_that_a_rank_does_not_load_are_not_sent() -> None:
    passing = entries_of([(1, None, {"size": torch.Size([2, 3])}), "text", torch.float32, 2.5j])
    facts, entries = read_description(described({"last": True}, passing))
    assert facts == {"last": True}
    assert entries == passing
    strange = (slice(1, 2), [range(3)], {"set": frozenset([1])}, np.float64(1.0), Size(1, 2))
    for value in strange:
        with pytest.raises(InvalidInput, match=r"a value of type \w+ passes between units"):
            described({}, entries_of([value]))


def refusing_on(rank: int) -> None:
    with together():
        if world().rank == rank:
            raise InvalidInput("Cannot use it: it is wrong. Give another.")


def test_what_a_rank_refuses_is_refused_by_all() -> None:
    for rank in (0, 1):
        for error in on_ranks(refusing_on, rank):
            assert isinstance(error, InvalidInput)
            assert f"it is wrong. Give another. (So says rank {rank}.)" in str(error)


def agreeing(differing: bool) -> str:
    agree(
        configuration={"lr": 0.1, "epochs": 2 + world().rank * differing},
        version={"torch": torch.__version__},
    )
    return "agreed"


def test_ranks_that_disagree_all_say_in_what() -> None:
    assert on_ranks(agreeing, False) == ["agreed", "agreed"]
    for error in on_ranks(agreeing, True):
        assert "the configuration of rank 1 is not that of rank 0 (epochs: 3 against 2)" in str(
            error
        )


def deciding() -> tuple[str, str]:
    decided = decided_by_first(lambda: f"by rank {world().rank}")
    try:
        decided_by_first(lambda: refusing_on_own())
    except InvalidInput as error:
        return decided, str(error)
    return decided, "nothing"


def refusing_on_own() -> None:
    raise InvalidInput(f"rank {world().rank} refuses")


def test_the_first_rank_decides_for_all() -> None:
    assert on_ranks(deciding) == [("by rank 0", "rank 0 refuses")] * 2


def dying(how: str) -> list[int]:
    if world().rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(2.5)
        raise InvalidInput("Cannot go on: this rank has had enough.")
    return gathered(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "the connection to another rank was lost"),
        ("hangs", "another rank has not answered for 1 s"),
        ("refuses", "rank 1 ended: Cannot go on: this rank has had enough."),
    ],
)
def test_others_end_when_a_rank(how: str, words: str) -> None:
    first, _ = on_ranks(dying, how, timeout=1.0)
    assert isinstance(first, LostRank)
    assert words in str(first)


def sharing() -> tuple[bool, bool]:
    local, first = learner("plain"), learner("plain")
    with torch.no_grad():
        local.model.conv1.weight += world().rank
    before = same_weights(local.model, first.model)
    share(local)
    return before, same_weights(local.model, first.model)


def test_all_ranks_begin_from_the_first_ones_weights() -> None:
    assert on_ranks(sharing) == [(True, True), (False, True)]


GLOO = (
    "Cannot train on several ranks: this PyTorch was built without gloo. Use a build that has it."
)
NCCL = GLOO.replace("gloo. Use a", "NCCL. Use --device cpu, or a")


@pytest.mark.parametrize(
    ("variables", "timeout", "words"),
    [
        ({}, 1e300, "Cannot use rank_timeout 1e+300: it is out of range"),
        ({}, float("nan"), "it is not finite"),
        ({}, 0.0, "Cannot use rank_timeout 0.0"),
        ({"MASTER_PORT": "abc"}, 1.0, "MASTER_PORT is 'abc'"),
        ({"MASTER_PORT": "70000"}, 1.0, "MASTER_PORT is '70000'"),
        ({"RANK": "2"}, 1.0, "RANK is 2. Start with torchrun"),
        ({"WORLD_SIZE": "-2"}, 1.0, "WORLD_SIZE is '-2', not a number of processes"),
        ({"WORLD_SIZE": "x"}, 1.0, "WORLD_SIZE is 'x', not a number of processes"),
    ],
)
def test_ranks_that_could_not_meet_are_refused_at_once(
    variables: dict[str, str], timeout: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (sound | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=re.escape(words)), joined("cpu", timeout):
        pytest.fail("ranks have met")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("absent", "device", "words"),
    [
        (("is_available", "is_initialized", "is_gloo_available", "is_nccl_available"), "cpu", GLOO),
        (("is_gloo_available",), "cpu", GLOO),
        (("is_nccl_available",), "cuda", NCCL),
    ],
)
def test_every_rank_refuses_a_backend_that_is_not_there_and_waits_for_none(
    absent: tuple[str, ...],
    device: str,
    words: str,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """PyTorch without ``torch.distributed`` has ``is_available`` alone of it."""
    for name, value in {"WORLD_SIZE": 2, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, absent[0], lambda: False)
    for name in absent[1:]:
        monkeypatch.delattr(dist, name)
    with pytest.raises(SystemExit) as end:
        main(["train", "vgg8", "--data", "digits", "--rule", "parallel", "--device", device])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"layerwise (rank {rank}): {words}\n"


def test_ranks_that_are_started_again_meet_where_nobody_has_been(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the store is that of those who have ended, as torchrun keeps it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store.clone(), 0, 2)]))
    store.set(f"{ASKS}/1", "one who has ended")
    parts: dict[int, Any] = {}
    for attempt in range(2):
        ranks = [
            threading.Thread(target=lambda r=rank: parts.update({r: common_store(r, 2, 10.0)}))
            for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(20)
        assert not parts[0].check(["address"])
        parts[1].set("address", f"of attempt {attempt}")
        assert parts[0].get("address").decode() == f"of attempt {attempt}"


def test_a_rank_of_an_earlier_attempt_that_still_waits_takes_nobodys_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has been answered when the rank that replaces it asks, and comes before that one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store.clone(), 0, 2)]))
    results: dict[str, Any] = {}

    def come(name: str, rank: int) -> None:
        try:
            results[name] = common_store(rank, 2, 5.0)
        except RuntimeError as error:
            results[name] = str(error)

    threads = {
        name: threading.Thread(target=come, args=(name, rank))
        for name, rank in {"earlier": 1, "first": 0, "second": 1}.items()
    }
    make_part = dist.PrefixStore

    def replaced_on_the_way(name: str, inner: Any) -> Any:
        if threading.current_thread() is threads["earlier"]:
            word = inner.get(f"{ASKS}/1")
            threads["second"].start()
            while inner.get(f"{ASKS}/1") == word:
                time.sleep(0.001)
        return make_part(name, inner)

    monkeypatch.setattr(dist, "PrefixStore", replaced_on_the_way)
    threads["earlier"].start()
    store.get(f"{ASKS}/1")
    threads["first"].start()
    for thread in threads.values():
        thread.join(20)
    assert results["earlier"] == "another process came as rank 1"
    results["second"].set("address", "here")
    assert results["first"].get("address") == b"here"


def test_ranks_that_do_not_come_are_not_waited_for_longer_than_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store.clone(), 0, 2)]))
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            common_store(rank, 2, 0.2)
