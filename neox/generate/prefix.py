"""Who owns which block of the cache: a tree over token ids that lets sequences share the keys of a common beginning.

A node is one full block: the tokens in it, after those of its ancestors. What a token leaves in the cache depends on
the tokens up to it and on nothing else, so a block that is there need not be computed again.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Stats:
    """What sharing and guessing were good for, counted since the engine was made."""

    hits: int = 0  # tokens found in the tree
    misses: int = 0  # tokens computed
    evictions: int = 0  # blocks taken from what no running sequence used
    preemptions: int = 0  # times that a running sequence was put back to make room
    guessed: int = 0  # tokens that were verified
    accepted: int = 0  # of these, tokens that were drawn


class Node:
    """A full block. A sequence that uses it uses all its ancestors."""

    __slots__ = ("block", "children", "parent", "tokens", "used", "users")

    def __init__(self, tokens: tuple[int, ...], block: int, parent: "Node | None") -> None:
        self.tokens, self.block, self.parent = tokens, block, parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0  # running sequences
        self.used = 0  # when it was last let go


class PrefixTree:
    """Hands out `blocks` blocks, and keeps full ones for others until their memory is needed: the one that was let go
    longest ago is evicted first."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.stats = blocks, Stats()
        self.root = Node((), -1, None)
        self._free = set(range(blocks))
        self._idle = 0  # nodes that no running sequence uses
        self._leaves: list[tuple[int, int, Node]] = []  # a heap of candidates for eviction; some are out of date
        self._clock = itertools.count(1)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and all that no running sequence uses."""
        return len(self._free) + self._idle

    def allocate(self, after: int | None = None) -> int | None:
        """A block of one's own, the one behind `after` if it is free; none where running sequences use them all."""
        if not self._free and not self._evict():
            return None
        block = after + 1 if after is not None and after + 1 in self._free else self._roomiest()
        self._free.remove(block)
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """Free blocks of one's own."""
        self._free.update(blocks)

    def child(self, node: Node, tokens: Sequence[int]) -> Node | None:
        return node.children.get(tuple(tokens))

    def nearest(self, node: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
        """The child of `node` that begins with most of `tokens`, and how many."""
        best, most = None, 0
        for child in node.children.values():
            pairs = enumerate(zip(child.tokens, tokens, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(child.tokens), len(tokens)))
            if same > most:
                best, most = child, same
        return best, most

    def publish(self, parent: Node, tokens: Sequence[int], block: int) -> Node:
        """Give a full block of one's own, and become a user of the node that has it. Where an equal one came first the
        block is freed and the node has another."""
        node = self.child(parent, tokens)
        if node is None:
            node = parent.children[tuple(tokens)] = Node(tuple(tokens), block, parent)
            node.users = 1
        else:
            self.give_back([block])
            self.hold(node)
        return node

    def hold(self, node: Node) -> None:
        """Become a user of a node, whose ancestors one uses already."""
        self._idle -= node.users == 0
        node.users += 1

    def let_go(self, node: Node) -> None:
        """Stop using a node, none of whose descendants one uses."""
        node.users -= 1
        node.used = next(self._clock)
        if node.users == 0:
            self._idle += 1
            self._offer(node)

    def _offer(self, node: Node) -> None:
        if node.parent is not None and node.users == 0 and not node.children:
            heapq.heappush(self._leaves, (node.used, node.block, node))
        if len(self._leaves) > 4 * self.blocks:
            self._leaves = [entry for entry in self._leaves if self._evictable(*entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _evictable(used: int, _: int, node: Node) -> bool:
        return node.parent is not None and used == node.used and not node.users and not node.children

    def _evict(self) -> bool:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            node, parent = entry[-1], entry[-1].parent
            if parent is None or not self._evictable(*entry):
                continue  # it was used, evicted or extended since
            del parent.children[node.tokens]
            node.parent = None
            self._free.add(node.block)
            self._idle -= 1
            self.stats.evictions += 1
            self._offer(parent)
            return True
        return False

    def _roomiest(self) -> int:
        """The middle of the longest run of free blocks: a sequence that grows in a row in memory is read in place."""
        free = sorted(self._free)
        runs = [[block for _, block in run] for _, run in itertools.groupby(enumerate(free), lambda x: x[1] - x[0])]
        longest = max(runs, key=len)
        return longest[0] if longest[0] == 0 else longest[len(longest) // 2]
