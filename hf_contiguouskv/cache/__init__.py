"""The transformers contract: `ContiguousKVCache` and its layers."""
