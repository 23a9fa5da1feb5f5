"""Which tokens the next forward pass computes, and in which memory: requests join, advance and leave between passes."""

from collections import deque
from collections.abc import Iterator

from neox.generate.prefix import Node, PrefixTree
from neox.generate.requests import Request
from neox.model.cache import BLOCK, KVPool


class Scheduler:
    """Plans passes of about `budget` tokens. At most `slots` requests decode at a time, and they come first: no prompt,
    however long, holds them up. The rest goes to prompts, the oldest first, cut where the budget ends."""

    def __init__(self, pool: KVPool, tree: PrefixTree, slots: int, budget: int) -> None:
        self.pool, self.tree, self.slots, self.budget = pool, tree, slots, budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that does not fit the cache even by itself."""
        room, most = self.tree.blocks * BLOCK, max(len(request.tokens), request.limit - 1)
        if most > room:
            raise ValueError(
                f"the prompt and its continuation take {most} positions of cache, there are {room}: "
                "raise cache_bytes, or lower max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check` lets pass."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request; its full blocks stay in the tree until their memory is needed."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    @property
    def admits(self) -> bool:
        """Whether one that waits may begin now, if there is memory."""
        return bool(self.waiting) and self._has_place(self.waiting[0])

    def reserve(self, request: Request, count: int) -> bool:
        """Blocks for `count` tokens more; false where that takes another's place, see `plan`."""
        while len(request.table) * BLOCK < request.computed + count:
            if not self._own_block(request):
                return False
        return True

    def plan(self) -> list[tuple[Request, int]]:
        """Requests, and how many pending tokens of each to compute now. Their blocks are there."""
        self._admit()
        left = max(BLOCK, self.budget - sum(request.pending for request in self._decoding()))
        plan: list[tuple[Request, int]] = []
        begun: set[tuple[int, tuple[int, ...]]] = set()
        # The oldest first, so that making room takes from those not planned yet.
        for request in list(self.running):
            if request not in self.running:
                continue  # put back just now
            count = request.pending
            if count > 1 + len(request.draft):
                if self._waits_for(request, begun):
                    continue
                self._fork(request)
                count = min(request.pending, left)
                left -= count
            if count > 0 and self._make_room(request, count):
                plan.append((request, min(count, request.pending)))
        return plan

    def advance(self, request: Request, count: int) -> None:
        """`count` more of its tokens are computed: full blocks are there for others now."""
        request.computed += count
        self.tree.stats.misses += count
        while request.computed >= (number := len(request.nodes) + 1) * BLOCK:
            parent = request.nodes[-1] if request.nodes else self.tree.root
            node = self.tree.publish(parent, request.block(number - 1), request.table[number - 1])
            request.nodes.append(node)
            request.table[number - 1] = node.block

    def reset(self) -> None:
        """Start all that runs anew, and with an empty tree, as after an exception that came at any point."""
        for request in reversed(self.running):
            request.computed, request.nodes, request.table, request.draft = 0, [], [], []
            self.waiting.appendleft(request)
        self.running = []
        stats, self.tree = self.tree.stats, PrefixTree(self.tree.blocks)
        self.tree.stats = stats

    def _decoding(self) -> Iterator[Request]:
        return (request for request in self.running if request.pending <= 1 + len(request.draft))

    def _admit(self) -> None:
        while self.admits:
            request, hits = self.waiting[0], self.tree.stats.hits
            self._match(request)
            if request.missing + sum(other.missing for other in self.running) > self.tree.available:
                self._release(request)
                self.tree.stats.hits = hits
                return
            self.running.append(self.waiting.popleft())

    def _has_place(self, request: Request) -> bool:
        if request.decodes:
            return sum(other.decodes for other in self.running) < self.slots
        return sum(other.pending for other in self.running) < self.budget

    def _match(self, request: Request) -> None:
        """Take over the blocks that the tree has. What is computed anyway, from `wanted` on, is left out."""
        while (place := self._border(request)) and len(place[1]) == BLOCK:
            node = self.tree.child(*place)
            if node is None:
                return
            self.tree.hold(node)
            request.nodes.append(node)
            request.table.append(node.block)
            request.computed += BLOCK
            self.tree.stats.hits += BLOCK

    def _border(self, request: Request) -> tuple[Node, list[int]] | None:
        """The node that a request stands behind, and the tokens of its next block that need not be computed if they are
        found; none where it is within a block of its own."""
        if request.computed != len(request.table) * BLOCK:
            return None
        last = min(request.wanted, len(request.tokens) - 1)
        parent = request.nodes[-1] if request.nodes else self.tree.root
        return parent, request.tokens[request.computed : last][:BLOCK]

    def _waits_for(self, request: Request, begun: set[tuple[int, tuple[int, ...]]]) -> bool:
        """Whether an older request computes its next block in this very pass: the tree will have it then."""
        self._match(request)
        parent = request.nodes[-1] if request.nodes else self.tree.root
        key = (id(parent), tuple(request.block(len(request.nodes))))
        place = self._border(request)
        if place and len(place[1]) == BLOCK and key in begun:
            return True
        begun.add(key)
        return False

    def _fork(self, request: Request) -> None:
        """Copy the beginning of a block that the request diverges from within."""
        source, same = self.tree.nearest(*place) if (place := self._border(request)) else (None, 0)
        if source is None:
            return
        self.tree.hold(source)  # or it might be evicted to make room for its copy
        if self._own_block(request):
            self.pool.copy(source.block, request.table[-1], same)
            request.computed += same
            self.tree.stats.hits += same
        self.tree.let_go(source)

    def _own_block(self, request: Request) -> bool:
        block = self.tree.allocate(request.table[-1] if request.table else None)
        if block is None:
            return False
        self.pool.clear(block)
        request.table.append(block)
        return True

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for `count` tokens more, the newest requests being put back for them; false if this was the newest."""
        while not self.reserve(request, count):
            if request.draft:  # a guess is not worth another's place
                count -= len(request.draft)
                request.draft = []
                continue
            newest = self.running.pop()
            self._release(newest)
            self.waiting.appendleft(newest)
            self.tree.stats.preemptions += 1
            if newest is request:
                return False
        return True

    def _release(self, request: Request) -> None:
        self.tree.give_back(request.table[len(request.nodes) :])
        for node in reversed(request.nodes):
            self.tree.let_go(node)
        request.computed, request.nodes, request.table, request.draft = 0, [], [], []
