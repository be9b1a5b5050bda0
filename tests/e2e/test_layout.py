"""The architecture, as rules about who may include whom and what lies where."""

import re
import subprocess
import warnings

import pytest

import harness

LAYERS = ("formats", "snap", "restore")
TOP_LEVEL = {"CMakeLists.txt", "snap", "restore", "formats", "tests", "man", "README.md", "LICENSE"}
LONG, TOO_LONG = 400, 600  # lines


def sources(folder):
    for path in sorted((harness.SOURCE / folder).rglob("*")):
        if path.suffix in (".h", ".cpp"):
            yield path.relative_to(harness.SOURCE)


def includes(path):
    """The project's own headers that a file includes."""
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', (harness.SOURCE / path).read_text(),
                      re.MULTILINE)


def may_include(path, header):
    """formats <- formats/store <- snap, restore; formats <- snap/vmm <- snap, restore;
    and snap/main.cpp puts all together."""
    if header.startswith("formats/store/"):
        return path.parts[:2] == ("formats", "store") or (
            path.parts[0] in ("snap", "restore") and path.parts[:2] != ("snap", "vmm"))
    if header.startswith("formats/"):
        return True
    folder = path.parts[0]
    if folder == "formats":
        return False
    if header.startswith("snap/vmm/"):
        return True
    if path.parts[:2] == ("snap", "vmm"):
        return False
    if header.startswith("snap/"):
        return folder == "snap"
    if header.startswith("restore/"):
        return folder == "restore" or path.as_posix() == "snap/main.cpp"
    return False  # neither a header of ours nor a path from the top


def test_the_rules_can_be_broken():
    """The function above says no where it should."""
    from pathlib import PurePosixPath as Path
    for path, header in (("formats/a.cpp", "snap/b.h"), ("formats/a.h", "restore/b.h"),
                         ("snap/vmm/a.cpp", "snap/b.h"), ("snap/vmm/a.cpp", "restore/b.h"),
                         ("formats/a.cpp", "formats/store/b.h"),
                         ("snap/vmm/a.cpp", "formats/store/b.h"),
                         ("snap/a.cpp", "restore/b.h"), ("restore/a.cpp", "snap/b.h"),
                         ("snap/a.cpp", "b.h")):
        assert not may_include(Path(path), header), f"{path} could include {header}"
    for path, header in (("snap/main.cpp", "restore/b.h"), ("restore/a.cpp", "snap/vmm/b.h"),
                         ("snap/a.cpp", "formats/b.h"), ("snap/a.cpp", "formats/store/b.h"),
                         ("formats/store/a.cpp", "formats/b.h"), ("snap/vmm/a.h", "snap/vmm/b.h")):
        assert may_include(Path(path), header), f"{path} could not include {header}"


@pytest.mark.parametrize("folder", LAYERS)
def test_layers(folder):
    wrong = [f"{path} includes {header}" for path in sources(folder) for header in includes(path)
             if not may_include(path, header)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", LAYERS)
def test_headers(folder):
    """Each is guarded, and each of ours that is included is there."""
    for path in sources(folder):
        text = (harness.SOURCE / path).read_text()
        if path.suffix == ".h":
            assert "#pragma once" in text, path
        for header in includes(path):
            assert (harness.SOURCE / header).is_file(), f"{path} includes {header}"
        assert "\t" not in text, f"{path} has tabs"


def listed_files():
    """What belongs to the source: what git knows or could add."""
    try:
        done = subprocess.run(["git", "-c", f"safe.directory={harness.SOURCE}", "ls-files",
                               "--cached", "--others", "--exclude-standard"], check=True,
                              cwd=harness.SOURCE, capture_output=True, text=True)
        return done.stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
        found = [path.relative_to(harness.SOURCE) for path in harness.SOURCE.rglob("*")
                 if path.is_file()]
        return [path.as_posix() for path in found
                if not path.parts[0].startswith("build") and path.parts[:2] != ("tests", "cache")
                and "__pycache__" not in path.parts]


def test_top_level():
    found = {name.split("/")[0] for name in listed_files()}
    odd = {name for name in found if not name.startswith(".")} - TOP_LEVEL
    assert not odd, f"does not belong at the top: {sorted(odd)}"


def test_no_long_files():
    """Long files are listed as warnings; much too long ones are failures."""
    for folder in (*LAYERS, "tests"):
        for path in sources(folder):
            lines = (harness.SOURCE / path).read_text().count("\n")
            if lines > LONG:
                warnings.warn(f"{path} has {lines} lines; it wants to be two files")
            assert lines <= TOO_LONG, f"{path} has {lines} lines; make it two files"


def test_nothing_of_this_machine_is_named():
    """No absolute path of somebody's workplace in what we ship."""
    for name in listed_files():
        path = harness.SOURCE / name
        if not path.is_file() or name.startswith("tests/e2e/test_layout"):
            continue
        text = path.read_bytes()
        for word in (b"/home/", b"/work" + b"/main", b"/root/"):
            assert word not in text, f"{name} names {word.decode()}"
