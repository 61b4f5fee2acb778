"""Sentence search with MiniLM, its attention called ragged, without any padding."""
