"""The CPU library's sources compile with clang, at every SIMD level (Debian: apt install clang)."""

from __future__ import annotations

from other_compilers import CLANG, said, steps


def test_every_source_compiles_without_a_warning(tmp_path):
    compiling = steps(CLANG, "x86_64", tmp_path)
    assert {word for step in compiling for word in step.command if word.startswith("-DSDP_LEVEL=")} == {
        "-DSDP_LEVEL=0",
        "-DSDP_LEVEL=1",
        "-DSDP_LEVEL=2",
    }
    for step in compiling:
        assert said(step, "-fsyntax-only") == "", step.text
