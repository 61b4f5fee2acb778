"""Ops that Acme adds."""
