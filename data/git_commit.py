"""Which code made a result, for evaluate.py."""
import subprocess
from pathlib import Path


def git_commit() -> str:
    """The commit of this code, '+' appended where the work tree differs from it; 'unknown' outside git."""
    git = lambda *args: subprocess.run(["git", *args], cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout.strip()
    return (git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")) or "unknown"
