"""The prefix cache: a tree of cache blocks over token ids, by which sequences share the keys of a common prefix.

A node is one full block: its tokens follow those of its ancestors. Keys and values depend on the tokens up to their
position alone, so a cached block need not be computed again. Unreferenced blocks are evicted, the least recently used
first (LRU).
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Stats:
    """Counters of the prefix cache and of speculative decoding since the engine was made."""

    hits: int = 0  # tokens found in the prefix cache
    misses: int = 0  # tokens computed
    evictions: int = 0  # unreferenced blocks whose memory was reused
    preemptions: int = 0  # running requests that went back to the queue for lack of memory
    drafted: int = 0  # draft tokens verified
    accepted: int = 0  # draft tokens accepted


class Node:
    """A full block; a sequence that references it references all its ancestors."""

    __slots__ = ("block", "children", "last_used", "parent", "references", "tokens")

    def __init__(self, tokens: tuple[int, ...], block: int, parent: "Node | None") -> None:
        self.tokens, self.block, self.parent = tokens, block, parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.references = 0  # running sequences
        self.last_used = 0  # time of its last release


class PrefixTree:
    """Allocate `blocks` blocks, and keep full ones for other sequences until their memory is needed."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.stats = blocks, Stats()
        self.root = Node((), -1, None)
        self._free = set(range(blocks))
        self._idle = 0  # nodes without references
        self._leaves: list[tuple[int, int, Node]] = []  # a heap of candidates for eviction; some are out of date
        self._clock = itertools.count(1)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and unreferenced ones."""
        return len(self._free) + self._idle

    def allocate(self, after: int | None = None) -> int | None:
        """A private block, the one behind `after` if it is free; None where running sequences use them all."""
        if not self._free and not self._evict():
            return None
        block = after + 1 if after is not None and after + 1 in self._free else self._largest_gap()
        self._free.remove(block)
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Free private blocks."""
        self._free.update(blocks)

    def child(self, node: Node, tokens: Sequence[int]) -> Node | None:
        return node.children.get(tuple(tokens))

    def longest_match(self, node: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
        """The child of `node` that begins with most of `tokens`, and how many."""
        best, most = None, 0
        for child in node.children.values():
            pairs = enumerate(zip(child.tokens, tokens, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(child.tokens), len(tokens)))
            if same > most:
                best, most = child, same
        return best, most

    def insert(self, parent: Node, tokens: Sequence[int], block: int) -> Node:
        """Insert a full private block as a node, and acquire it.

        Where an equal block was inserted before, the private one is freed and the older node is acquired.
        """
        node = self.child(parent, tokens)
        if node is None:
            node = parent.children[tuple(tokens)] = Node(tuple(tokens), block, parent)
            node.references = 1
        else:
            self.free([block])
            self.acquire(node)
        return node

    def acquire(self, node: Node) -> None:
        """Reference a node, whose ancestors are referenced already."""
        self._idle -= node.references == 0
        node.references += 1

    def release(self, node: Node) -> None:
        """Drop a reference to a node, whose descendants are released already."""
        node.references -= 1
        node.last_used = next(self._clock)
        if node.references == 0:
            self._idle += 1
            self._offer(node)

    def _offer(self, node: Node) -> None:
        if node.parent is not None and node.references == 0 and not node.children:
            heapq.heappush(self._leaves, (node.last_used, node.block, node))
        if len(self._leaves) > 4 * self.blocks:
            self._leaves = [entry for entry in self._leaves if self._evictable(*entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _evictable(used: int, _: int, node: Node) -> bool:
        return node.parent is not None and used == node.last_used and not node.references and not node.children

    def _evict(self) -> bool:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            node, parent = entry[-1], entry[-1].parent
            if parent is None or not self._evictable(*entry):
                continue  # acquired, evicted or extended since
            del parent.children[node.tokens]
            node.parent = None
            self._free.add(node.block)
            self._idle -= 1
            self.stats.evictions += 1
            self._offer(parent)
            return True
        return False

    def _largest_gap(self) -> int:
        """The middle of the longest run of free blocks, so that a growing sequence stays contiguous."""
        free = sorted(self._free)
        runs = [[block for _, block in run] for _, run in itertools.groupby(enumerate(free), lambda x: x[1] - x[0])]
        longest = max(runs, key=len)
        return longest[0] if longest[0] == 0 else longest[len(longest) // 2]
