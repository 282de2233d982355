"""Limits of control groups, in trees of files as Linux has them."""

import platform
import sys
from pathlib import Path

import psutil
import pytest
from moelora import cgroups
from moelora.cgroups import Group
from moelora.commands import memory

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import memory as measured

V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
UNIFIED = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
NONE = str(2**63 - 4096)  # version 1's "no limit" with pages of 4 kB


def tree(root: Path, own: str, mounts: list[str], files: tuple[str, str], limits: dict) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    disk = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"
    (root / "proc/self/mountinfo").write_text("\n".join([disk, *mounts, ""]))
    for where, values in limits.items():
        (root / where).mkdir(parents=True, exist_ok=True)
        for name, value in zip(files, values, strict=True):
            (root / where / name).write_text(f"{value}\n")
    return root


SCOPE = "sys/fs/cgroup/user.slice/user-0.slice/run-1.scope"
CASES = {
    "a systemd scope": (
        "0::/user.slice/user-0.slice/run-1.scope\n", [UNIFIED], V2,
        {SCOPE: (8000, 3000), "sys/fs/cgroup/user.slice": ("max", 5000)}, [Group(8000, 3000)],
    ),
    "a slice above the scope": (
        "0::/user.slice/user-0.slice/run-1.scope\n", [UNIFIED], V2,
        {SCOPE: ("max", 10), "sys/fs/cgroup/user.slice/user-0.slice": (7000, 10), "sys/fs/cgroup/user.slice":
         (9000, 20)}, [Group(7000, 10), Group(9000, 20)],
    ),
    "a container with a name space of its own": (
        "0::/\n", [UNIFIED], V2, {"sys/fs/cgroup": (6000, 1000)}, [Group(6000, 1000)],
    ),
    "no limit": ("0::/a\n", [UNIFIED], V2, {"sys/fs/cgroup/a": ("max", 1)}, []),
    "version 1": (
        "9:name=systemd:/\n4:memory:/slurm/job_5\n3:cpuset:/\n0::/\n", [CPU, MEMORY, HYBRID], V1,
        {"sys/fs/cgroup/memory/slurm/job_5": (5000, 50), "sys/fs/cgroup/memory/slurm": (NONE, 60),
         "sys/fs/cgroup/memory": (NONE, 70), "sys/fs/cgroup/cpu/slurm/job_5": (1, 1)}, [Group(5000, 50)],
    ),
    "version 1 with controllers together": (
        "4:cpu,memory:/a\n", [MEMORY.replace("rw,memory", "rw,cpu,memory")], V1,
        {"sys/fs/cgroup/memory/a": (5000, 50)}, [Group(5000, 50)],
    ),
    "version 1 in a container that sees its part": (
        "4:memory:/docker/abc\n", [MEMORY.replace("0:32 / ", "0:32 /docker/abc ")], V1,
        {"sys/fs/cgroup/memory": (4000, 40)}, [Group(4000, 40)],
    ),
    "a group that the mount does not show": (
        "4:memory:/docker/abc\n", [MEMORY], V1, {"sys/fs/cgroup/memory": (4000, 40)}, [Group(4000, 40)],
    ),
    "a group outside of the name space": (
        "0::/../other\n", [UNIFIED], V2, {"sys/fs/cgroup": (6000, 1)}, [Group(6000, 1)],
    ),
    "none": ("", [], V2, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_groups_of_a_process(case, tmp_path):
    *made, expected = CASES[case]
    assert cgroups.groups(tree(tmp_path, *made)) == expected


def test_a_machine_without_control_groups(tmp_path):
    assert cgroups.groups(tmp_path) == []


@pytest.mark.skipif(platform.system() != "Linux", reason="control groups are Linux's")
def test_this_process():
    assert all(0 < group.limit < cgroups.UNLIMITED and group.used > 0 for group in cgroups.groups())


def test_what_inspect_and_the_benchmarks_count_on(monkeypatch):
    """The least of what is free and what every group leaves."""
    monkeypatch.setattr(cgroups, "groups", lambda: [])
    free, available = memory.room(), measured._available()
    assert abs(free - available - psutil.Process().memory_info().rss) < 2e9
    monkeypatch.setattr(cgroups, "groups", lambda: [Group(10**15, 0), Group(5_000_000, 2_000_000)])
    assert memory.room() == 5_000_000 and measured._available() == 3_000_000
    monkeypatch.setattr(cgroups, "groups", lambda: [Group(1_000_000, 2_000_000)])
    assert measured._available() == 0
