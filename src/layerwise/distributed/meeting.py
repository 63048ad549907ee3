"""Meeting of ranks in a part of their common store that nobody has written to before.

``torchrun`` keeps the store when it starts ranks again. Addresses of ranks that have ended are in
it still, which gloo and NCCL would try to connect to; and its count of restarts is not alike on all
hosts, so it cannot tell attempts apart.
"""

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

ASKS, ANSWERS, CAME = "layerwise/asks", "layerwise/answers", "came"  # keys
PAUSE = 0.01  # seconds between two looks at who has asked


def common_store(rank: int, size: int, timeout: float) -> "dist.Store":
    """The part of the store that ``torchrun``'s environment names in which these ranks meet.

    Every rank asks by a word of its own, and the first answers it with the name of the part. An
    answer to a rank of an earlier attempt has another word, so nobody reads it.

    Raises:
        RuntimeError: not all ranks came in time.
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
    part.add(CAME, 1)
    return part


def answer_all(
    store: "dist.Store", part: "dist.Store", name: str, size: int, timeout: float
) -> None:
    """Tell all ranks the name of the part, until they have come there.

    Raises:
        RuntimeError: not all came in time.
    """
    end = time.monotonic() + timeout
    while part.add(CAME, 0) < size - 1:
        for key in [f"{ASKS}/{rank}" for rank in range(1, size)]:
            if store.check([key]):
                store.set(f"{ANSWERS}/{store.get(key).decode()}", name)
        if time.monotonic() > end:
            raise RuntimeError("no answer from a rank")
        time.sleep(PAUSE)
