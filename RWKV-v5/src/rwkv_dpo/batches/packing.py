"""Which samples of an optimizer step share a model call, where calls are filled by tokens."""

import heapq
from collections.abc import Sequence

from rwkv_dpo.batches.sampling import deal


def pack(sizes: Sequence[int], capacity: int, n_ranks: int) -> list[list[list[int]]]:
    """Numbers of items by rank and by model call. No call holds more than `capacity`, all ranks have equally many calls, which are as few
    and as even as a greedy deal makes them. Raises ValueError for an item that no call can hold.

    >>> pack([5, 9, 1, 8, 2], 10, n_ranks=1)
    [[[1], [3], [0, 2, 4]]]
    """
    if max(sizes) > capacity:
        raise ValueError(f"an item of {max(sizes)} does not fit into {capacity}")
    n_calls = -(-sum(sizes) // (capacity * n_ranks))
    while (calls := _dealt(sizes, capacity, n_calls * n_ranks)) is None:
        n_calls += 1
    loads = [sum(sizes[i] for i in items) for items in calls]
    return [[calls[number] for number in hand] for hand in deal(range(len(calls)), loads, n_ranks)]


def _dealt(sizes: Sequence[int], capacity: int, n_calls: int) -> list[list[int]] | None:
    """The largest item first, each to the call that has least; None where one no longer fits."""
    least_first = [(0, number) for number in range(n_calls)]
    calls: list[list[int]] = [[] for _ in range(n_calls)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, number = least_first[0]
        if load + sizes[item] > capacity:
            return None
        calls[number].append(item)
        heapq.heapreplace(least_first, (load + sizes[item], number))
    return [sorted(items) for items in calls]
