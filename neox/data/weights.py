"""Weights of the entries of data.train in a blend: given, by document counts, or the Pile's."""

from __future__ import annotations

from collections.abc import Sequence

from neox.config import DataConfig
from neox.data.provenance import Provenance
from neox.data.split import Documents


def blend_weights(data: DataConfig, sources: Sequence[Documents]) -> tuple[float, ...]:
    """Weights, one a source; none where the config asks for no blend.

    Raises ValueError where `data.weigh = "pile"` and a source is not one of the Pile's components.
    """
    if data.weigh == "documents":
        return by_documents([len(source) for source in sources], data.alpha)
    if data.weigh == "pile":
        return tuple(_pile_weight(source) for source in sources)
    return data.weights


def by_documents(documents: Sequence[int], alpha: float) -> tuple[float, ...]:
    """Weights from numbers of documents, as gpt-neox's weight_by_num_documents.

    Of n_i of N documents: p_i (1 - n_i / N), normalised, where p_i is the normalised (n_i / N)^alpha. A single dataset
    has weight 1.

    Below 1 alpha favours small datasets, as a temperature would. Source: EleutherAI/gpt-neox,
    megatron/data/data_utils.py (weights_by_num_docs), its options weight_by_num_documents and weighted_sampler_alpha.
    """
    if len(documents) == 1:
        return (1.0,)
    total = sum(documents)
    shares = [count / total for count in documents]
    powers = [share**alpha for share in shares]
    weights = [power / sum(powers) * (1 - share) for power, share in zip(powers, shares, strict=True)]
    return tuple(weight / sum(weights) for weight in weights)


def _pile_weight(source: Documents) -> float:
    from neox.config.pile import COMPONENTS

    names = Provenance.of(source.file).components(source.first, len(source))
    if len(names) != 1 or names[0] not in COMPONENTS:
        raise ValueError(
            f'{source.name}: data.weigh = "pile" needs each entry of data.train to be one component of the Pile, this '
            f"holds {', '.join(map(str, names)) or 'none'}: prepare the components apart, or give data.weights"
        )
    return COMPONENTS[names[0]].weight
