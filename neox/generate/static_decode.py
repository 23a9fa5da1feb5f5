"""Decoding in passes of fixed shape over a static key-value cache: on CUDA, captured graphs that are replayed.

A pass takes one token of each running request, computes its keys in memory of fixed addresses (`static_cache.py`),
samples the next token on the device and leaves it there for the next pass. The host sees tokens a pass late: while pass
n runs it reads the tokens of pass n - 1. The end of a text is found late too; the token sampled meanwhile is dropped.

On CUDA a pass is a CUDA graph, one for each (rows, extent, way of sampling) that occurs; elsewhere the same code runs
eagerly. Shapes: b rows, S extent, V vocab.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neox.generate.requests import Generation
from neox.generate.sampling import sample_rows
from neox.generate.static_cache import StaticCache
from neox.model.cache import BLOCK, KVPool
from neox.model.decoder import GPTNeoX
from neox.system.device import free_memory

SMALLEST = 128  # positions of the shortest pass; longer ones have a power of two times as many


class Pass(NamedTuple):
    """A pass in flight: the host has not read its tokens yet."""

    requests: list[Generation | None]  # by row; None once the token is collected
    uniforms: list[float]
    tokens: Tensor  # [b] on the host, complete once `done` has happened
    done: torch.cuda.Event | None


class _Row:
    """The row of a request in the static cache."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded = 0  # positions in the row
        self.stored = 0  # positions that the pool holds too


class StaticDecoder:
    """Submit passes and collect their tokens, for the engine."""

    def __init__(self, model: GPTNeoX, pool: KVPool, slots: int, num_real_tokens: int, window: int) -> None:
        self.model, self.pool, self.slots, self.window = model, pool, slots, window
        self.num_real_tokens = num_real_tokens
        self.device = pool.keys.device
        self.in_flight: deque[Pass] = deque()
        self._rows: dict[Generation, _Row] = {}
        self._cache: StaticCache | None = None
        self._graphs: dict[tuple[int, int, str], Callable[[], None]] = {}
        # Inputs of a pass: position, token (-1: the one sampled last), and the settings of `sample_rows`.
        self._inputs = torch.zeros(7, slots, dtype=torch.float64, device=self.device)
        self._sampled = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None  # graphs take turns

    def num_in_flight(self, request: Generation) -> int:
        """Tokens of a request that are being computed."""
        return sum(request in launched.requests for launched in self.in_flight)

    def can_run(self, requests: Sequence[Generation]) -> bool:
        """True where one pass can take these: one pending token each, sampled on the device, and memory for it."""
        if not requests or not all(one.pending == 1 and one.sampler.samples_on_device for one in requests):
            return False
        return self._reserve_length(max(request.limit for request in requests))

    def submit(self, requests: Sequence[Generation]) -> None:
        """Start a pass over one token of each request; their blocks are allocated."""
        cache = self._cache
        assert cache is not None
        by_row: list[Generation | None] = [None] * self.slots
        given = [[-1.0 if line == 0 else 0.0] * self.slots for line in range(7)]
        extent, filtered, greedy = 1, False, True
        for request in requests:
            row, ahead = self._row(request, cache), self.num_in_flight(request)
            position, sampling = request.computed + ahead, request.sampler.sampling
            by_row[row.number] = request
            last = -1 if ahead else request.tokens[-1]
            settings = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            uniform = request.sampler.uniform() if sampling.temperature else 0.0
            for line, value in zip(given, (position, last, *settings, uniform), strict=True):
                line[row.number] = value
            row.loaded = position + 1
            extent = max(extent, position + 1)
            greedy &= sampling.temperature == 0
            filtered |= sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        rows = _power(1 + max(number for number, request in enumerate(by_row) if request), 1, self.slots)
        extent = _power(extent, SMALLEST, cache.longest)
        kind = "greedy" if greedy else "filtered" if filtered else "plain"
        self._inputs.copy_(self._pinned(torch.tensor(given, dtype=torch.float64)), non_blocking=True)
        tokens = self._pinned(torch.empty(rows, dtype=torch.long))
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        self.in_flight.append(Pass(by_row[:rows], given[-1][:rows], tokens, done))
        self._graph(rows, extent, kind)()
        tokens.copy_(self._sampled[:rows], non_blocking=True)
        if done is not None:
            done.record()

    def collect(self) -> Iterator[tuple[Generation, int]]:
        """Wait for the oldest pass; yields its tokens one by one, -1 where the logits were not finite."""
        landed = self.in_flight[0]
        if landed.done is not None:
            landed.done.synchronize()
        for row, token in enumerate(landed.tokens.tolist()):
            request, landed.requests[row] = landed.requests[row], None
            if request is not None:
                yield request, token
        self.in_flight.popleft()

    def write_back(self, request: Generation, stop: int) -> None:
        """Copy a request's positions below `stop` to the pool, where it lacks them."""
        row = self._rows.get(request)
        if row is None or self._cache is None:
            return
        stop = min(stop, row.loaded)
        while row.stored < stop:
            number = row.stored // BLOCK
            end = min(stop, (number + 1) * BLOCK)
            self._cache.store(row.number, request.table[number], row.stored, end)
            row.stored = end

    def retain(self, running: Sequence[object]) -> None:
        """Free the rows of all other requests."""
        self._rows = {request: row for request, row in self._rows.items() if request in running}

    def reset(self) -> None:
        """Drop all passes and rows, as after an exception at any point; their random numbers are used again."""
        for launched in reversed(self.in_flight):
            for request, uniform in zip(launched.requests, launched.uniforms, strict=True):
                if request is not None and request.sampler.sampling.temperature:
                    request.sampler.unused.insert(0, uniform)
        self.in_flight.clear()
        self._rows = {}
        if self._cache is not None:
            self._cache.clear()

    def _row(self, request: Generation, cache: StaticCache) -> _Row:
        """The request's row, with the positions that other passes computed."""
        if request not in self._rows:
            taken = {row.number for row in self._rows.values()}
            self._rows[request] = _Row(next(number for number in range(self.slots) if number not in taken))
        row = self._rows[request]
        if self.num_in_flight(request) == 0 and row.loaded != request.computed:
            start = row.loaded if row.loaded < request.computed else 0  # preempted since: computed anew
            cache.load(row.number, request.table, start, request.computed)
            row.loaded = row.stored = request.computed
        return row

    def _reserve_length(self, longest: int) -> bool:
        """Allocate rows for sequences of that length; False where the device lacks the memory."""
        extent = _power(longest, SMALLEST, self.model.config.max_position_embeddings)
        if self._cache is not None and self._cache.longest >= extent:
            return True
        if self.in_flight:
            return False  # they are collected first
        self._rows, self._graphs, self._cache = {}, {}, None
        need = StaticCache.bytes(self.pool, self.slots, extent)
        if self.device.type == "cuda" and need > 0.9 * free_memory(self.device):
            return False
        self._cache = StaticCache(self.pool, self.slots, extent, self.window)
        return True

    def _pass(self, rows: int, extent: int, kind: str) -> None:
        assert self._cache is not None
        given = self._inputs[:, :rows]
        positions, last = given[0].long(), given[1].long()
        tokens = torch.where(last >= 0, last, self._sampled[:rows]).clamp(min=0)
        cache = self._cache.view(positions, extent)
        hidden = self.model(tokens[None], positions=cache.positions, cache=cache, head=False)[0]
        logits = self.model.embed_out(hidden)[:, : self.num_real_tokens]
        self._sampled[:rows] = sample_rows(logits, None if kind == "greedy" else given[2:], kind == "filtered")

    def _graph(self, rows: int, extent: int, kind: str) -> Callable[[], None]:
        """The pass of that shape, captured where the device is CUDA."""
        key = rows, extent, kind
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key) if self.device.type == "cuda" else lambda: self._pass(*key)
        return self._graphs[key]

    def _captured(self, rows: int, extent: int, kind: str) -> Callable[[], None]:
        # Libraries initialize in a first run, which a graph must not capture. Its writes are repeated by the pass, but
        # for the sampled tokens, which the pass reads.
        sampled = self._sampled.clone()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            self._pass(rows, extent, kind)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self._sampled.copy_(sampled)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._pass(rows, extent, kind)
        return graph.replay

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _power(needed: int, smallest: int, largest: int) -> int:
    """The least `smallest` times a power of two from `needed` on, at most `largest`."""
    while smallest < needed:
        smallest *= 2
    return min(smallest, largest)
