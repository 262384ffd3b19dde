"""Outputs: refused before the work, whole or not at all, and what was there stays where the writing fails."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lingbot_kernels.files import append_text, check_output, replacing, write_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("before")
    Path("folder").mkdir()
    Path("link").symlink_to("file")
    Path("dangling").symlink_to("none/file")
    Path("new-link").symlink_to("new")
    Path("full").symlink_to("/dev/full")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    return tmp_path


REFUSED = [
    ("/proc/x.json", "can't be written"),
    ("/proc/version", "can't be written"),
    ("/sys/x.json", "can't be written"),
    ("/dev/full", "No space left on device"),
    ("full", "No space left on device"),
    ("folder", "is a folder, must be a file"),
    ("", "is a folder, must be a file"),
    ("/", "is a folder, must be a file"),
    ("none/x", "the folder none does not exist"),
    ("dangling", "does not exist"),
    ("file/x", "the folder file is none"),
    ("loop", "can't be written"),
    ("x" * 300, "File name too long"),
    ("a\0b", "null byte"),
]
TAKEN = ["new", "file", "link", "new-link", "pipe", "/dev/null", "/dev/stdout", "folder/../x", "x" * 250, "ü.json"]


@pytest.mark.parametrize(("name", "reason"), REFUSED, ids=[repr(name)[:20] for name, _ in REFUSED])
def test_what_can_not_be_written_is_refused(name, reason, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError) as refused:
        check_output(Path(name))
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("name", TAKEN, ids=[name[:20] for name in TAKEN])
def test_a_check_leaves_nothing_behind(name, append, folder):
    before = {path: path.stat(follow_symlinks=False).st_mtime_ns for path in folder.rglob("*")}
    check_output(Path(name), append=append)
    assert {path: path.stat(follow_symlinks=False).st_mtime_ns for path in folder.rglob("*")} == before
    assert Path("file").read_text() == "before"


def test_a_file_that_grows_may_lack_its_folder(folder):
    check_output(Path("a/b/rows.jsonl"), append=True)
    assert not Path("a").exists()
    append_text(Path("a/b/rows.jsonl"), "one\n")
    append_text(Path("a/b/rows.jsonl"), "two\n")
    assert Path("a/b/rows.jsonl").read_text() == "one\ntwo\n"
    with pytest.raises(ValueError, match="can't be written"):
        check_output(Path("/proc/a/b"), append=True)
    with pytest.raises(ValueError, match="is none"):
        check_output(Path("file/b"), append=True)


def test_too_little_space_is_told_beforehand(folder):
    with pytest.raises(ValueError, match=r"x: needs 1152921504606846976 bytes, must be at most the \d+ free"):
        check_output(Path("x"), nbytes=2**60)


@pytest.mark.parametrize("name", ["file", "link", "new", "new-link"])
def test_a_file_has_its_name_only_once_it_is_whole(name, folder):
    names = sorted(folder.iterdir())
    before = Path(name).read_text() if Path(name).exists() else None
    with pytest.raises(KeyboardInterrupt), replacing(Path(name)) as part:
        part.write_text("half")
        assert part.suffix == Path(name).suffix
        raise KeyboardInterrupt
    assert sorted(folder.iterdir()) == names
    assert (Path(name).read_text() if Path(name).exists() else None) == before
    write_text(Path(name), "whole")
    assert Path(name).read_text() == "whole"
    assert Path("link").is_symlink() and Path("new-link").is_symlink()


def test_permissions_stay_and_new_files_get_the_usual_ones(folder):
    Path("file").chmod(0o640)
    write_text(Path("file"), "x")
    assert stat.S_IMODE(Path("file").stat().st_mode) == 0o640
    write_text(Path("new"), "x")
    Path("plain").write_text("x")
    assert Path("new").stat().st_mode == Path("plain").stat().st_mode


def test_devices_are_written_as_they_are(folder):
    write_text(Path("/dev/null"), "x")
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("full"), "x")
    with pytest.raises(OSError, match="No space left"):
        append_text(Path("full"), "x")
    assert Path("full").is_symlink()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_gets_the_text_where_it_stands(name, folder):
    program = (
        "from pathlib import Path\nfrom lingbot_kernels.files import check_output, write_text\n"
        f"print('table')\ncheck_output(Path({name!r}))\nwrite_text(Path({name!r}), 'report\\n')\nprint('end')"
    )
    with Path("out.txt").open("w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, timeout=300)
    assert Path("out.txt").read_text() == "table\nreport\nend\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "table\nreport\nend\n"


def test_a_line_is_appended_whole_or_not_at_all(folder):
    """With room for two and a half lines, two are there."""
    program = (
        "import resource, signal\nfrom pathlib import Path\nfrom lingbot_kernels.files import append_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (25, 25))\n"
        "for _ in range(3):\n    append_text(Path('rows'), '0123456789'[:9] + '\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert "File too large" in done.stderr
    assert Path("rows").read_text() == "012345678\n" * 2
