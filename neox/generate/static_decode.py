"""Decoding in passes of fixed shape, for devices that the host must not keep waiting: recorded once, then replayed.

A pass takes one token of each running request, computes its keys in memory of fixed addresses (`cache.StaticCache`),
draws the next token on the device and hands it to the next pass there. The host sees tokens a pass late: while pass n
runs it reads what pass n - 1 drew. That a text ends is found late too, and the token drawn meanwhile is left out.

On CUDA a pass is a graph, one for each (rows, extent, way of drawing) that comes up; elsewhere the same code runs as it
is written. Shapes: b rows, S extent, V vocab.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neox.generate.requests import Generation
from neox.generate.sampling import draw
from neox.model.cache import BLOCK, KVPool, StaticCache
from neox.model.decoder import GPTNeoX

SMALLEST = 128  # positions that the shortest pass attends to; longer ones have a power of two times as many


class Pass(NamedTuple):
    """A pass whose tokens the host has not read yet."""

    requests: list[Generation | None]  # by row, until their token was handed out
    uniforms: list[float]
    tokens: Tensor  # [b] on the host, there once `done` has come
    done: torch.cuda.Event | None


class _Row:
    """Where a request is in the static cache."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded = 0  # positions that are there
        self.stored = 0  # of these, those that the pool has too


class StaticDecoder:
    """Launches passes and collects their tokens; the engine says for whom, and accepts them."""

    def __init__(self, model: GPTNeoX, pool: KVPool, slots: int, usable: int, window: int) -> None:
        self.model, self.pool, self.slots, self.usable, self.window = model, pool, slots, usable, window
        self.device = pool.keys.device
        self.flying: deque[Pass] = deque()
        self._rows: dict[Generation, _Row] = {}
        self._cache: StaticCache | None = None
        self._graphs: dict[tuple[int, int, str], Callable[[], None]] = {}
        # What differs from pass to pass: position, token (-1: the one drawn last), and the dials of `draw`.
        self._given = torch.zeros(7, slots, dtype=torch.float64, device=self.device)
        self._drawn = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None  # graphs take turns

    def ahead(self, request: Generation) -> int:
        """Tokens of a request that are being drawn."""
        return sum(request in launched.requests for launched in self.flying)

    def takes(self, requests: Sequence[Generation]) -> bool:
        """Whether these can all be in a pass: each is to compute one token, draws by logits, dials and seed alone, and
        there is memory."""
        if not requests or not all(one.pending == 1 and one.sampler.is_plain for one in requests):
            return False
        return self._grown(max(request.limit for request in requests))

    def launch(self, requests: Sequence[Generation]) -> None:
        """Start a pass over one token of each. Their blocks are there."""
        cache = self._cache
        assert cache is not None
        by_row: list[Generation | None] = [None] * self.slots
        given = [[-1.0 if line == 0 else 0.0] * self.slots for line in range(7)]
        extent, filtered, greedy = 1, False, True
        for request in requests:
            row, ahead = self._row(request, cache), self.ahead(request)
            position, sampling = request.computed + ahead, request.sampler.sampling
            by_row[row.number] = request
            last = -1 if ahead else request.tokens[-1]
            dials = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            uniform = request.sampler.uniform() if sampling.temperature else 0.0
            for line, value in zip(given, (position, last, *dials, uniform), strict=True):
                line[row.number] = value
            row.loaded = position + 1
            extent = max(extent, position + 1)
            greedy &= sampling.temperature == 0
            filtered |= sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        rows = _power(1 + max(number for number, request in enumerate(by_row) if request), 1, self.slots)
        extent = _power(extent, SMALLEST, cache.longest)
        kind = "greedy" if greedy else "filtered" if filtered else "plain"
        self._given.copy_(self._pinned(torch.tensor(given, dtype=torch.float64)), non_blocking=True)
        tokens = self._pinned(torch.empty(rows, dtype=torch.long))
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        self.flying.append(Pass(by_row[:rows], given[-1][:rows], tokens, done))
        self._graph(rows, extent, kind)()
        tokens.copy_(self._drawn[:rows], non_blocking=True)
        if done is not None:
            done.record()

    def land(self) -> Iterator[tuple[Generation, int]]:
        """Wait for the oldest pass; the tokens that it drew, one by one, -1 where the logits were no numbers."""
        landed = self.flying[0]
        if landed.done is not None:
            landed.done.synchronize()
        for row, token in enumerate(landed.tokens.tolist()):
            request, landed.requests[row] = landed.requests[row], None
            if request is not None:
                yield request, token
        self.flying.popleft()

    def hand_back(self, request: Generation, stop: int) -> None:
        """Copy to the pool what it lacks of a request's positions below `stop`."""
        row = self._rows.get(request)
        if row is None or self._cache is None:
            return
        stop = min(stop, row.loaded)
        while row.stored < stop:
            number = row.stored // BLOCK
            end = min(stop, (number + 1) * BLOCK)
            self._cache.store(row.number, request.table[number], row.stored, end)
            row.stored = end

    def keep(self, running: Sequence[object]) -> None:
        """Free the rows of all but these."""
        self._rows = {request: row for request, row in self._rows.items() if request in running}

    def drop(self) -> None:
        """Forget everything, as after an exception that came at any point. Draws that nobody saw are drawn again."""
        for launched in reversed(self.flying):
            for request, uniform in zip(launched.requests, launched.uniforms, strict=True):
                if request is not None and request.sampler.sampling.temperature:
                    request.sampler.unused.insert(0, uniform)
        self.flying.clear()
        self._rows = {}
        if self._cache is not None:
            self._cache.clear()

    def _row(self, request: Generation, cache: StaticCache) -> _Row:
        """Its row, with what others computed of it meanwhile."""
        if request not in self._rows:
            taken = {row.number for row in self._rows.values()}
            self._rows[request] = _Row(next(number for number in range(self.slots) if number not in taken))
        row = self._rows[request]
        if self.ahead(request) == 0 and row.loaded != request.computed:
            start = row.loaded if row.loaded < request.computed else 0  # put back since: computed anew
            cache.load(row.number, request.table, start, request.computed)
            row.loaded = row.stored = request.computed
        return row

    def _grown(self, longest: int) -> bool:
        """Room for sequences of that length; false where the device has none."""
        extent = _power(longest, SMALLEST, self.model.config.max_position_embeddings)
        if self._cache is not None and self._cache.longest >= extent:
            return True
        if self.flying:
            return False  # they land first
        self._rows, self._graphs, self._cache = {}, {}, None
        need = StaticCache.bytes(self.pool, self.slots, extent)
        if self.device.type == "cuda" and need > 0.9 * torch.cuda.mem_get_info(self.device)[0]:
            return False
        self._cache = StaticCache(self.pool, self.slots, extent, self.window)
        return True

    def _pass(self, rows: int, extent: int, kind: str) -> None:
        assert self._cache is not None
        given = self._given[:, :rows]
        positions, last = given[0].long(), given[1].long()
        tokens = torch.where(last >= 0, last, self._drawn[:rows]).clamp(min=0)
        cache = self._cache.view(positions, extent)
        hidden = self.model(tokens[None], positions=cache.positions, cache=cache, head=False)[0]
        logits = self.model.embed_out(hidden)[:, : self.usable]
        self._drawn[:rows] = draw(logits, None if kind == "greedy" else given[2:], kind == "filtered")

    def _graph(self, rows: int, extent: int, kind: str) -> Callable[[], None]:
        """The pass of that shape, ready to run."""
        key = rows, extent, kind
        if key not in self._graphs:
            self._graphs[key] = self._recorded(*key) if self.device.type == "cuda" else lambda: self._pass(*key)
        return self._graphs[key]

    def _recorded(self, rows: int, extent: int, kind: str) -> Callable[[], None]:
        # Libraries set themselves up in a first run, which a graph must not record. It writes what the pass writes
        # again, but for the tokens drawn, which the pass reads.
        drawn = self._drawn.clone()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            self._pass(rows, extent, kind)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self._drawn.copy_(drawn)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._pass(rows, extent, kind)
        return graph.replay

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _power(needed: int, smallest: int, largest: int) -> int:
    """`smallest` times a power of two that holds `needed`, at most `largest`."""
    while smallest < needed:
        smallest *= 2
    return min(smallest, largest)
