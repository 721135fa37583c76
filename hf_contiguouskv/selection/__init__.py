"""Which chunks of the prefix a request needs: one module per method, one protocol."""

from ..store.key_index import build_key_index
from .attention_mass import AttentionMass
from .base import ChunkScorer, ChunkScores, SelectionInput, choose_chunks, voting_queries
from .device_products import device_product
from .indexed_keys import IndexedKeys
from .integer_products import chosen_products
from .scratch import Scratch

__all__ = [
    "AttentionMass",
    "ChunkScorer",
    "ChunkScores",
    "IndexedKeys",
    "Scratch",
    "SelectionInput",
    "build_key_index",
    "choose_chunks",
    "chosen_products",
    "device_product",
    "voting_queries",
]
