"""Which chunks of the prefix a request needs: one module per method, one protocol."""

from ..store.key_index import build_key_index
from .attention_mass import AttentionMassScorer
from .base import ChunkScorer, ChunkScores, SelectionInput, choose_chunks, voting_queries
from .device_products import device_product
from .indexed_keys import IndexedKeysScorer
from .integer_products import Scratch, chosen_products

__all__ = [
    "AttentionMassScorer",
    "ChunkScorer",
    "ChunkScores",
    "IndexedKeysScorer",
    "Scratch",
    "SelectionInput",
    "build_key_index",
    "choose_chunks",
    "chosen_products",
    "device_product",
    "voting_queries",
]
