"""The scheduler of continuous batching: the tokens of the next forward pass, and their cache blocks."""

from collections import deque
from collections.abc import Iterator

from neox.generate.prefix import Node, PrefixTree
from neox.generate.requests import Request
from neox.model.cache import BLOCK, KVPool


class Scheduler:
    """Form batches of about `budget` tokens.

    At most `slots` requests decode at a time. They come first, so that no long prompt delays them. The rest of the
    budget goes to prompts (chunked prefill), the oldest first.
    """

    def __init__(self, pool: KVPool, tree: PrefixTree, slots: int, budget: int) -> None:
        self.pool, self.tree, self.slots, self.budget = pool, tree, slots, budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that does not fit the cache even by itself."""
        room, most = self.tree.blocks * BLOCK, max(len(request.tokens), request.limit - 1)
        if most > room:
            raise ValueError(
                f"the prompt and its continuation take {most} positions of cache, there are {room}: "
                "raise cache_bytes, or lower max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request that passed `check`."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request; its full blocks stay in the prefix cache until their memory is needed."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    @property
    def can_admit(self) -> bool:
        """True where a waiting request may start now, if there is memory."""
        return bool(self.waiting) and self._has_slot(self.waiting[0])

    def reserve(self, request: Request, count: int) -> bool:
        """Allocate blocks for `count` more tokens; False if that would require preemption."""
        while len(request.table) * BLOCK < request.computed + count:
            if not self._append_block(request):
                return False
        return True

    def next_batch(self) -> list[tuple[Request, int]]:
        """The requests of the next pass, and the number of pending tokens of each; their blocks are allocated."""
        self._admit()
        left = max(BLOCK, self.budget - sum(request.pending for request in self._decoding()))
        batch: list[tuple[Request, int]] = []
        started: set[tuple[int, tuple[int, ...]]] = set()
        # The oldest first, so that preemption takes requests that are not in the batch yet.
        for request in list(self.running):
            if request not in self.running:
                continue  # just preempted
            count = request.pending
            if count > 1 + len(request.draft):
                if self._shares_next_block(request, started):
                    continue
                self._copy_partial_block(request)
                count = min(request.pending, left)
                left -= count
            if count > 0 and self._reserve_or_preempt(request, count):
                batch.append((request, min(count, request.pending)))
        return batch

    def advance(self, request: Request, count: int) -> None:
        """Record `count` more computed tokens; full blocks go into the prefix cache."""
        request.computed += count
        self.tree.stats.misses += count
        while request.computed >= (number := len(request.nodes) + 1) * BLOCK:
            parent = request.nodes[-1] if request.nodes else self.tree.root
            node = self.tree.insert(parent, request.block(number - 1), request.table[number - 1])
            request.nodes.append(node)
            request.table[number - 1] = node.block

    def reset(self) -> None:
        """Restart all running requests with an empty prefix cache, as after an exception at any point."""
        for request in reversed(self.running):
            request.computed, request.nodes, request.table, request.draft = 0, [], [], []
            self.waiting.appendleft(request)
        self.running = []
        stats, self.tree = self.tree.stats, PrefixTree(self.tree.blocks)
        self.tree.stats = stats

    def _decoding(self) -> Iterator[Request]:
        return (request for request in self.running if request.pending <= 1 + len(request.draft))

    def _admit(self) -> None:
        while self.can_admit:
            request, hits = self.waiting[0], self.tree.stats.hits
            self._match_prefix(request)
            if request.missing + sum(other.missing for other in self.running) > self.tree.available:
                self._release(request)
                self.tree.stats.hits = hits
                return
            self.running.append(self.waiting.popleft())

    def _has_slot(self, request: Request) -> bool:
        if request.decodes:
            return sum(other.decodes for other in self.running) < self.slots
        return sum(other.pending for other in self.running) < self.budget

    def _match_prefix(self, request: Request) -> None:
        """Acquire matching blocks of the prefix cache, up to the first position whose logits are needed."""
        while (point := self._lookup_point(request)) and len(point[1]) == BLOCK:
            node = self.tree.child(*point)
            if node is None:
                return
            self.tree.acquire(node)
            request.nodes.append(node)
            request.table.append(node.block)
            request.computed += BLOCK
            self.tree.stats.hits += BLOCK

    def _lookup_point(self, request: Request) -> tuple[Node, list[int]] | None:
        """The deepest matched node, and the tokens of the next block, for a prefix lookup; None within a block."""
        if request.computed != len(request.table) * BLOCK:
            return None
        last = min(request.logits_from, len(request.tokens) - 1)
        parent = request.nodes[-1] if request.nodes else self.tree.root
        return parent, request.tokens[request.computed : last][:BLOCK]

    def _shares_next_block(self, request: Request, started: set[tuple[int, tuple[int, ...]]]) -> bool:
        """True where an older request computes the same next block in this pass: the cache will hold it then."""
        self._match_prefix(request)
        parent = request.nodes[-1] if request.nodes else self.tree.root
        key = (id(parent), tuple(request.block(len(request.nodes))))
        point = self._lookup_point(request)
        if point and len(point[1]) == BLOCK and key in started:
            return True
        started.add(key)
        return False

    def _copy_partial_block(self, request: Request) -> None:
        """Copy the common beginning of a cached block that the request diverges from."""
        source, same = self.tree.longest_match(*point) if (point := self._lookup_point(request)) else (None, 0)
        if source is None:
            return
        self.tree.acquire(source)  # or it might be evicted to make room for its copy
        if self._append_block(request):
            self.pool.copy(source.block, request.table[-1], same)
            request.computed += same
            self.tree.stats.hits += same
        self.tree.release(source)

    def _append_block(self, request: Request) -> bool:
        block = self.tree.allocate(request.table[-1] if request.table else None)
        if block is None:
            return False
        self.pool.clear(block)
        request.table.append(block)
        return True

    def _reserve_or_preempt(self, request: Request, count: int) -> bool:
        """Allocate blocks for `count` more tokens, preempting the newest requests; False if this one was preempted."""
        while not self.reserve(request, count):
            if request.draft:  # no draft is worth a preemption
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
        self.tree.free(request.table[len(request.nodes) :])
        for node in reversed(request.nodes):
            self.tree.release(node)
        request.computed, request.nodes, request.table, request.draft = 0, [], [], []
