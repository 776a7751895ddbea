"""Operators built from smaller ones of this package, each of which chooses its own backend."""
