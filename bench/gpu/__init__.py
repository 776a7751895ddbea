"""``python -m bench.gpu``: correctness, sanitizers, configurations and speed on a GPU, in parts that can be resumed.

What each part does and how to run it on a rented machine: docs/gpu.md. ``--rehearse`` runs the same code on a CPU.

A part is one file in ``parts/``. The process that the user starts never touches the GPU: it hands cases to workers
(worker.py), writes each finished case at once (store.py), and goes on when a worker dies (pool.py, runner.py).
"""
