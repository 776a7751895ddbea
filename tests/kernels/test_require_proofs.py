"""SDP_REQUIRE_PROOFS=1: a skipped test or module fails the run; without it, it is a skip with its reason.

So it is with pytest-xdist's workers, and a test that ends its worker is told by name.
"""

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


def run(tmp_path: Path, code: str, required: str, *options: str):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(code, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on another machine\n", encoding="utf-8")
    options = ("-rs", "-p", "no:cacheprovider", *options, str(tmp_path))
    return python("-m", "pytest", *options, SDP_REQUIRE_PROOFS=required)


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


def test_workers_count_proofs_and_fail_on_a_skip(tmp_path):
    marked = SKIPPING["test"].replace("def test_b", "@pytest.mark.proof('some')\ndef test_b")
    done = run(tmp_path, marked, "1", "-n2")
    assert done.returncode != 0 and "SDP_REQUIRE_PROOFS=1 and this was skipped" in done.stdout
    assert REASON in done.stdout and "1 failed, 1 passed" in done.stdout
    assert "proof some: 1 passed in 0 s" in done.stdout


def test_a_worker_that_dies_ends_the_run_and_the_test_is_named(tmp_path):
    code = "import os\ndef test_a():\n    os.abort()\n" + PASSING
    done = run(tmp_path, code, "1", "-n2")
    assert done.returncode != 0 and "crashed while running 'test_it.py::test_a'" in done.stdout
    assert "worker restarting disabled" in done.stdout
