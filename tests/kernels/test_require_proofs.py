"""SDP_REQUIRE_PROOFS=1: a skipped test or module fails the run; without it, it is a skip with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from _subprocess import python

TESTS = Path(__file__).parents[1]
PASSING = "def test_b():\n    pass\n"
REASON = "no such thing here"
SKIPPING = {
    "test": f"import pytest\ndef test_a():\n    pytest.skip('{REASON}')\n{PASSING}",  # what is tested
    "mark": f"import pytest\n@pytest.mark.skipif(True, reason='{REASON}')\ndef test_a():\n    pass\n{PASSING}",
    "module": f"import pytest\npytest.skip('{REASON}', allow_module_level=True)\n",  # what is tested
}


def run(tmp_path: Path, code: str, required: str):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(code, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on another machine\n", encoding="utf-8")
    return python("-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path), SDP_REQUIRE_PROOFS=required)


@pytest.mark.parametrize("kind", SKIPPING)
def test_skip_fails_where_proofs_are_required(tmp_path, kind):
    done = run(tmp_path, SKIPPING[kind], "1")
    assert done.returncode != 0 and "SDP_REQUIRE_PROOFS=1 and this was skipped" in done.stdout
    assert REASON in done.stdout and " skipped" not in done.stdout.splitlines()[-1]


def test_skip_is_a_skip_otherwise(tmp_path):
    done = run(tmp_path, SKIPPING["test"], "0")
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout and REASON in done.stdout


def test_tests_for_a_gpu_may_be_skipped(tmp_path):
    code = "import pytest\n@pytest.mark.gpu\ndef test_a():\n    pytest.skip('no GPU')\n"  # what is tested
    assert run(tmp_path, code, "1").returncode == 0
