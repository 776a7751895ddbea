"""Builds the two optional extensions of ``sdp_kernels`` without importing torch: one file per question.

settings.py       what the user asked for (environment variables)
toolchain.py      what this machine has (compilers, Python's headers, GPUs)
torch_headers.py  where torch's headers come from
plan.py           which commands make an extension
execute.py        running them (ninja, or one by one)
extensions.py     the policy: build, or record why not; the report
command.py        the same as a setuptools command
backend.py        the PEP 517 hooks that pyproject.toml names
"""
