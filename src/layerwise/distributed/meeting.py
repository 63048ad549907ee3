"""Meeting of ranks in a part of their common store that nobody has written to before.

``torchrun`` keeps the store when it starts ranks again. Addresses of ranks that have ended are in
it still, which gloo and NCCL would try to connect to; and its count of restarts is not alike on all
hosts, so it cannot tell attempts apart.
"""

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

# keys; the last two are in the part
ASKS, ANSWERS, CAME, MET = "layerwise/asks", "layerwise/answers", "came", "met"
PAUSE = 0.01  # seconds between two looks at who has asked


def common_store(rank: int, size: int, timeout: float) -> "dist.Store":
    """The part of the store that ``torchrun``'s environment names in which these ranks meet.

    Every rank asks by a word of its own, and the first answers it with the name of the part. An
    answer to a rank of an earlier attempt has another word, so nobody reads it, unless that rank
    still waits: then it comes to the part too, and leaves if another has asked in its place.

    Raises:
        RuntimeError: not all ranks came in time, or another process came as this rank.
    """
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
    store.set_timeout(limit)
    word = uuid4().hex
    if rank == 0:
        part = dist.PrefixStore(word, store)
        answer_all(store, part, word, size, timeout)
        return part
    store.set(f"{ASKS}/{rank}", word)
    part = dist.PrefixStore(store.get(f"{ANSWERS}/{word}").decode(), store)
    part.set(f"{CAME}/{word}", str(rank))
    if word not in part.get(MET).decode().split():
        raise RuntimeError(f"another process came as rank {rank}")
    return part


def answer_all(
    store: "dist.Store", part: "dist.Store", name: str, size: int, timeout: float
) -> None:
    """Tell all ranks the name of the part, until they have come there; then tell who has met.

    Raises:
        RuntimeError: not all came in time.
    """
    end = time.monotonic() + timeout
    while not all(words := [answer(store, part, name, rank) for rank in range(1, size)]):
        if time.monotonic() > end:
            raise RuntimeError("no answer from a rank")
        time.sleep(PAUSE)
    part.set(MET, " ".join(words))


def answer(store: "dist.Store", part: "dist.Store", name: str, rank: int) -> str:
    """The word of the process that asked last as this rank, if it has come to the part; else "".

    It is told the name of the part until then.
    """
    if not store.check([f"{ASKS}/{rank}"]):
        return ""
    word: str = store.get(f"{ASKS}/{rank}").decode()
    if part.check([f"{CAME}/{word}"]):
        return word
    store.set(f"{ANSWERS}/{word}", name)
    return ""
