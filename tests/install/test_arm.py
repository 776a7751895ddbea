"""The CPU library's sources compile for ARM with GCC's cross compiler (Debian: apt install g++-aarch64-linux-gnu).

What it makes can't run here. What has run on ARM, emulated, stands in CONTRIBUTING.md.
"""

from __future__ import annotations

import subprocess

from other_compilers import ARM, said, steps


def test_every_source_compiles_without_a_warning(tmp_path):
    for step in steps(ARM, "aarch64", tmp_path):
        assert said(step, "-fsyntax-only") == "", step.text


def test_16_bit_types_are_converted_by_neons_instructions(tmp_path):
    """fp16 by one for four elements, where the portable form takes thirty."""
    (step,) = [step for step in steps(ARM, "aarch64", tmp_path) if step.inputs[0].name == "kelu.cpp"]
    assert said(step) == ""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(step.output)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = {line.split("\t")[1].split()[0] for line in listed.splitlines() if line.count("\t") > 1}
    assert {"fcvtl", "fcvtn", "shll", "shrn", "fmla"} <= instructions
