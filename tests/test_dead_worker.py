"""A worker of pytest-xdist that dies, in a small suite of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

QUIET = "def test_quiet(): pass\n"
# The first waited for ever, for the worker in the dead one's place, which was given the finished test_0.py alone.
DIES = {
    "in a test": {"test_0.py": QUIET, "test_1.py": QUIET, "test_2.py": "import os\ndef test_dies(): os.abort()\n"},
    "while another works on": {
        "test_0.py": "import os\ndef test_dies(): os.abort()\n",
        "test_1.py": "import time\ndef test_long(): time.sleep(300)\n",
    },
    "while it collects": {"test_0.py": QUIET, "test_1.py": "import os\nos.abort()\n"},
}


@pytest.mark.parametrize("when", DIES)
def test_a_worker_that_dies_ends_the_suite_with_a_failure(tmp_path: Path, when: str) -> None:
    files = {"conftest.py": "from dead_worker import *\n", **DIES[when]}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout
    assert "::test_dies" in done.stdout if when != "while it collects" else "crashed" in done.stdout


def test_this_suite_has_the_hooks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.option.maxworkerrestart == "0"
