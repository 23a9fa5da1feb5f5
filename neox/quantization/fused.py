"""The fused decoder: all blocks of a packed model in one call of the compiled kernels.

Each row is computed by itself: no other row, no chunk of a prompt and no number of threads changes a bit of it: this is
batch invariance (design D16). Shapes: N packed tokens, C hidden, R rotary dims.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neox.model.cache import BLOCK, KVPool, Span
from neox.model.decoder import Block, GPTNeoX
from neox.model.rotary import rotary_angles
from neox.quantization.kernels import native
from neox.quantization.kernels.native import Matrix, address
from neox.quantization.packed import PackedLinear

FUNCTIONS = {"gelu": 1, "gelu_fast": 2, "gelu_new": 2, "gelu_pytorch_tanh": 2}  # numbers of panels.h's enum


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "dense", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias", "second", "second_bias")),
        ("local", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "norm", "norm_bias", "cos", "sin")),
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "hidden", "heads", "head_dim", "rotary", "ffn", "window", "parallel", "function")
        ),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "tables", "owned", "keys", "values")),
        ("blocks", ctypes.c_int64),
    )


class Decoder:
    """Compute the blocks of a packed `model` by the kernels; see `decoder`."""

    def __init__(self, loaded: ctypes.CDLL, model: GPTNeoX) -> None:
        config = model.config
        self._loaded, self.model = loaded, model
        blocks = [_block(layer, number in config.local_layers) for number, layer in enumerate(model.layers)]
        self._blocks = (_Block * len(blocks))(*blocks)
        # Of all positions at once: a vector's last lanes may be rounded otherwise than the others.
        angles = rotary_angles(config, torch.arange(config.max_position_embeddings)[None], cached=True)
        self._angles = [part[0, 0, 0].contiguous() for part in angles]  # cos, sin [positions, R / 2]
        self._norm = model.final_layer_norm
        self._head = _matrix(model.embed_out)
        self._decoder = _Decoder(
            ctypes.addressof(self._blocks),
            address(self._norm.weight),
            address(self._norm.bias),
            *(address(part) for part in self._angles),
            len(blocks),
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.rotary_dim,
            config.ffn_size,
            config.local_window,
            config.use_parallel_residual,
            FUNCTIONS[config.hidden_act],
            config.layer_norm_eps,
            config.softmax_scale,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(self, tokens: Sequence[int], spans: Sequence[Span], pool: KVPool) -> Tensor:
        """Final hidden states [N, C], float32, of the tokens of all spans, one after the other."""
        places, tables, blocks = array("q"), array("q"), array("i")
        for span in spans:
            places.extend(range(span.start, span.start + span.count))
            tables.extend([len(blocks)] * span.count)
            blocks.extend(span.table)
        rows = len(places)
        assert len(tokens) == rows
        assert pool.keys.dtype == torch.float32
        cache = _Cache(
            *(part.buffer_info()[0] for part in (places, tables, blocks)),
            address(pool.keys),
            address(pool.values),
            pool.keys.shape[2] // BLOCK,
        )
        positions = torch.frombuffer(places, dtype=torch.long)[None]
        x = self.model.embed(torch.tensor([tokens]), positions)[0].float().contiguous()
        out = torch.empty_like(x)
        threads, longest = torch.get_num_threads(), max(span.start + span.count for span in spans)
        longest = -(-longest // 256) * 256  # in steps, so that scratch memory is not made anew for each token
        decoder = ctypes.byref(self._decoder)
        scratch = self._memory(self._loaded.neox_decoder_scratch(decoder, rows, longest, threads))
        self._loaded.neox_decode(
            decoder, ctypes.byref(cache), x.data_ptr(), out.data_ptr(), rows, longest, scratch, threads
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, C]."""
        rows, head = len(hidden), self._head
        y = torch.empty(rows, head.outputs)
        scratch = self._memory(self._loaded.neox_scratch(head.kind, rows, head.inputs))
        self._loaded.neox_linear(
            ctypes.byref(head), hidden.data_ptr(), y.data_ptr(), scratch, rows, torch.get_num_threads()
        )
        return y

    def _memory(self, size: int) -> int:
        """Address of that many bytes of scratch memory, which the next call reuses."""
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch.data_ptr()


def decoder(model: GPTNeoX) -> Decoder | None:
    """The fused decoder of a packed model; None where the model is left to torch.

    None for a model that is not packed whole, for an activation that the kernels do not have, and without kernels.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = [module for layer in model.layers for module in layer.modules() if isinstance(module, PackedLinear)]
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    able = len(packed) == 4 * len(model.layers) and not linears and model.config.hidden_act in FUNCTIONS
    able = able and all(parameter.dtype == torch.float32 for norm in norms for parameter in norm.parameters())
    if not able or any(module.packed.device.type != "cpu" for module in packed):
        return None  # before kernels are compiled that nothing needs
    loaded = native.library()
    return Decoder(loaded, model) if loaded is not None else None


def _block(layer: nn.Module, local: bool) -> _Block:
    assert isinstance(layer, Block)
    second = layer.post_attention_layernorm
    attention, mlp = layer.attention, layer.mlp
    products = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    return _Block(
        *map(_matrix, products),
        address(layer.input_layernorm.weight),
        address(layer.input_layernorm.bias),
        None if second is None else address(second.weight),
        None if second is None else address(second.bias),
        local,
    )


def _matrix(product: nn.Module) -> Matrix:
    assert isinstance(product, PackedLinear)
    return Matrix.of(product.stored, product.bias)
