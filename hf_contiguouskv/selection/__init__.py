"""Which chunks of the prefix a request needs: one module per method, one protocol."""

from .attention_mass import AttentionMassScorer
from .base import ChunkScorer, ChunkScores, SelectionInput, choose_chunks, voting_queries
from .device_products import device_product
from .index_parts import CoarseIndex, KeyIndex
from .indexed_keys import IndexedKeysScorer
from .integer_products import Scratch, chosen_products
from .single_tokens import choose_tokens

__all__ = [
    "AttentionMassScorer",
    "ChunkScorer",
    "ChunkScores",
    "CoarseIndex",
    "IndexedKeysScorer",
    "KeyIndex",
    "Scratch",
    "SelectionInput",
    "choose_chunks",
    "choose_tokens",
    "chosen_products",
    "device_product",
    "voting_queries",
]
