"""Benchmarks: ``pytest bench`` compares the fused operators with plain PyTorch, torch.compile and other libraries.

How a time comes about, what the columns mean and how to read a report: docs/benchmarks.md.
"""
