"""A small Llama-shaped model, trained on Python's own documentation and served from a paged KV cache."""
