"""Memory that was freed is kept for what comes next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from monai_rl_reg import memory

PROGRAM = """
import resource, sys, torch
from monai_rl_reg.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    volumes = [torch.ones(4_000_000) for _ in range(12)]  # 16 MB each
work()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # else glibc may come to keep some by itself
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env=fixed)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_taken_anew() -> None:
    usual, kept = faults("leave"), faults("keep")
    assert usual > 1000  # each page is asked for again and again
    assert kept < usual / 10


def test_imports_leave_nothing_to_the_collector() -> None:
    program = """
import gc
from monai_rl_reg.memory import quick_imports
before = [s["collections"] for s in gc.get_stats()]
with quick_imports():
    assert not gc.isenabled()
    import monai_rl_reg.registration
assert [s["collections"] for s in gc.get_stats()] == before
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
with quick_imports():
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_collector_goes_on_after_an_import_that_fails() -> None:
    program = """
import gc
from monai_rl_reg.memory import quick_imports
try:
    with quick_imports():
        import monai_rl_reg.nowhere
except ImportError:
    assert gc.isenabled()
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_job_s_own_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUPS", ((str(limit), str(used)),))
    assert memory.available_memory() > 1 << 28  # none there: the machine's own
    used.write_text(f"{1 << 20}\n")
    limit.write_text("max\n")
    assert memory.available_memory() > 1 << 28
    limit.write_text(f"{3 << 20}\n")
    assert memory.available_memory() == 2 << 20
    assert psutil.virtual_memory().available > 2 << 20
