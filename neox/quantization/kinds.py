"""The table of packed kinds, read by loading, planning and the command line; without torch.

    kind        blocks        head          embeddings     loss
    fp32        fp32          fp32          as they are    none
    fp16        fp16          fp16          fp16           none where the weights are stored in float16
    bf16        bf16          bf16          bf16           none where the weights are stored in bfloat16
    w16a16      bf16          bf16          bf16           that of a model in bfloat16, and no more
    int8        int8          int8          16 bits        see docs/weights.md
    int4        int4          int8          16 bits        see docs/weights.md

A product's input is float32. w16a16 rounds it to bfloat16, int8 and int4 to 8 bits with a scale for GROUP values.
"""

from typing import Literal, NamedTuple, get_args

Kind = Literal["fp32", "fp16", "bf16", "w16a16", "int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of the C source's enum
GROUP = 128  # weights of a row that share a scale


class Format(NamedTuple):
    """Storage of a weight [outputs, inputs] in a kind."""

    bits: int
    dtype: str  # torch's name of the type in memory; two weights of 4 bits are a byte
    neighbours: int  # weights of one output side by side in memory
    activations: int = 32  # bits of a product's input
    scales: Literal["none", "row", "group"] = "none"  # fp32 a row, bf16 a group
    head: Kind | None = None  # the head's kind, where it is another one

    def bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a weight [outputs, inputs] with its scales, without padding."""
        scales = {"none": 0, "row": 4 * outputs, "group": 2 * outputs * -(-inputs // GROUP)}[self.scales]
        return outputs * inputs * self.bits // 8 + scales


FORMATS: dict[Kind, Format] = {
    "fp32": Format(32, "float32", 1),
    "fp16": Format(16, "float16", 1),
    "bf16": Format(16, "bfloat16", 2),
    "w16a16": Format(16, "bfloat16", 2, activations=16),
    "int8": Format(8, "int8", 4, activations=8, scales="row"),
    "int4": Format(4, "uint8", 4, activations=8, scales="group", head="int8"),
}
