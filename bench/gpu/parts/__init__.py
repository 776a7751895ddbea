"""The parts of ``python -m bench.gpu``, one file each; what such a file holds is said in ``bench/gpu/part.py``."""
