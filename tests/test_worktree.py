"""Another commit of the checkout, for comparisons of evidence: there while it is needed, gone afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.compare import worktree


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@n", "-C", str(folder)]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / "file").write_text("old")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "old"], check=True)
    (folder / "file").write_text("new")
    return folder


def trees(repository: Path) -> int:
    listed = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def test_another_commit_is_checked_out_and_removed_whatever_happens(repository: Path) -> None:
    with worktree(repository, "HEAD") as tree:
        assert (tree / "file").read_text() == "old" and trees(repository) == 2
    assert not tree.exists() and trees(repository) == 1
    with pytest.raises(ZeroDivisionError), worktree(repository, "HEAD") as tree:
        raise ZeroDivisionError
    assert not tree.exists() and trees(repository) == 1
    with pytest.raises(ValueError, match="base must name a commit, got 'nonsense'"), worktree(repository, "nonsense"):
        pass
    assert trees(repository) == 1
