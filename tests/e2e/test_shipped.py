"""The files beside the program: the units, the cron line, the completion.

The example configuration is tried by the parser's own test
(tests/snap/backup_config_test.cpp).
"""

import os
import re
import shlex
import shutil
import subprocess

import pytest

import harness

EXAMPLES = harness.SOURCE / "man/examples"
COMPLETION = harness.SOURCE / "man/completions/vmsnap.bash"


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          timeout=harness.LIMIT, check=False, **options)


def help_of(*command):
    done = run(harness.VMSNAP, *command, "--help")
    assert done.returncode == 0, done
    return done.stdout


def commands():
    """The indented first words below "Subcommands:"."""
    found = re.findall(r"^  (\S+)", help_of().partition("\nSubcommands:\n")[2], re.MULTILINE)
    assert "snapshot" in found, found
    return found


def long_options(*command):
    """What stands before the first space of each option's first line."""
    text = help_of(*command).partition("\nOptions:\n")[2]
    names = re.findall(r"^  (-\S+)", text, re.MULTILINE)
    return [name for group in names for name in group.split(",") if name.startswith("--")]


def complete(line, program=harness.VMSNAP, folder=None):
    """What bash would offer at the end of a line, without bash-completion."""
    words = [word for part in shlex.split(line) for word in re.split("(=)", part) if word]
    if line.endswith((" ", "=")):
        words.append("")
    words[0] = str(program)
    script = (f". {shlex.quote(str(COMPLETION))}\n"
              f"COMP_WORDS=({shlex.join(words)})\nCOMP_CWORD={len(words) - 1}\n"
              "function=$(complete -p vmsnap | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
              '"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}"\n'
              'printf "%s\\n" "${COMPREPLY[@]}"\n')
    done = run("bash", "--norc", "-c", script, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done
    return sorted(done.stdout.split())


def test_completion_is_valid_bash():
    done = run("bash", "-n", COMPLETION)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_completion_offers_the_subcommands():
    assert complete("vmsnap ") == sorted(commands())
    assert complete("vmsnap sn") == ["snapshot"]
    assert not complete("vmsnap nonsense-")
    assert complete("vmsnap --") == sorted(long_options())


def test_completion_offers_the_options_of_each_subcommand():
    for command in commands():
        wanted = long_options(command)
        assert "--help" in wanted and len(wanted) > 1, f"{command}: {wanted}"
        assert complete(f"vmsnap {command} --") == sorted(wanted), command
        assert complete(f"vmsnap {command} --hel") == ["--help"]


def test_completion_of_values(tmp_path):
    for name in ("a.img", "b.img"):
        (tmp_path / name).touch()
    files = ["a.img", "b.img"]
    for line in ("vmsnap show ", "vmsnap snapshot --output ", "vmsnap snapshot -o ",
                 "vmsnap snapshot --output=", "vmsnap snapshot --qmp ", "vmsnap export --raw ",
                 "vmsnap export --force ", "vmsnap restore a.img -- "):
        assert complete(line, folder=tmp_path) == files, line
    assert complete("vmsnap show b", folder=tmp_path) == ["b.img"]
    assert complete("vmsnap snapshot --disks ", folder=tmp_path) == ["none"]
    for line in ("vmsnap snapshot --level ", "vmsnap snapshot --pid ",
                 "vmsnap snapshot --in-pause-limit="):
        assert not complete(line, folder=tmp_path), line


def test_completion_of_snapshot_ids(tmp_path):
    """From `vmsnap list --store DIR --quiet`; a script stands for the program."""
    store = tmp_path / "a store"
    program = tmp_path / "vmsnap"
    program.write_text('#!/bin/sh\n[ "$1 $2 $4" = "list --store --quiet" ] || exit 2\n'
                       f'[ "$3" = {shlex.quote(str(store))} ] && echo "1a2b\n1c3d\n9e"\n')
    program.chmod(0o755)
    quoted = shlex.quote(str(store))
    assert complete(f"vmsnap show --store {quoted} ", program) == ["1a2b", "1c3d", "9e"]
    assert complete(f"vmsnap show --store {quoted} 1", program) == ["1a2b", "1c3d"]
    assert complete(f"vmsnap diff --store {quoted} 1a2b 9", program) == ["9e"]
    assert complete(f"vmsnap rm --store={quoted} 1c", program) == ["1c3d"]
    assert not complete(f"vmsnap show --store {quoted}x 1", program)


def test_units_are_valid(tmp_path):
    harness.need(shutil.which("systemd-analyze"), "systemd", "systemd-analyze is not installed")
    # The program and the manual need not be installed where the tests run.
    for name in ("vmsnap-backup.service", "vmsnap-backup.timer"):
        text = (EXAMPLES / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/vmsnap", str(harness.VMSNAP)))
    done = run("systemd-analyze", "verify", "--man=no", tmp_path / "vmsnap-backup.service",
               tmp_path / "vmsnap-backup.timer", env={**os.environ, "LC_ALL": "C"})
    # It also names what is wrong with other units of the machine.
    ours = [line for line in done.stderr.splitlines() if "vmsnap" in line]
    assert done.returncode == 0 and not ours, done.stderr


def test_a_wrong_unit_is_found(tmp_path):
    """The check above can fail: systemd only warns of a key that it does not know."""
    harness.need(shutil.which("systemd-analyze"), "systemd", "systemd-analyze is not installed")
    unit = tmp_path / "vmsnap-backup.service"
    text = (EXAMPLES / unit.name).read_text().replace("/usr/bin/vmsnap", str(harness.VMSNAP))
    unit.write_text(text.replace("KillMode=", "KilMode="))
    done = run("systemd-analyze", "verify", "--man=no", unit, env={**os.environ, "LC_ALL": "C"})
    assert "KilMode" in done.stderr, done


def test_cron_line():
    """Five fields, a user that exists, and a command of ours; no name with a dot for cron.d."""
    lines = [line for line in (EXAMPLES / "vmsnap.cron").read_text().splitlines()
             if line and not line.startswith("#") and not re.match(r"[A-Z]+=", line)]
    assert len(lines) == 1, lines
    commented = re.findall(r"^# (30 0 .* root .*)$", (EXAMPLES / "vmsnap.cron").read_text(), re.MULTILINE)
    assert len(commented) == 1 and "%" not in commented[0], commented
    unmounted = run("sh", "-c", commented[0].split("root ", 1)[1].replace("/backup/vms", "/nowhere"))
    assert unmounted.returncode == 1 and "is not mounted" in unmounted.stderr, "cron mails nothing"
    assert re.fullmatch(r"(\S+ ){5}root vmsnap backup --config /\S+ >>/\S+", lines[0]), lines
    assert "%" not in lines[0], "cron makes a new line of it"


@pytest.mark.parametrize("name", ["vmsnap-backup.service", "vmsnap.cron", "vmsnap.logrotate"])
def test_examples_agree_on_paths(name):
    """One place for the configuration, one for the log."""
    text = (EXAMPLES / name).read_text()
    paths = set(re.findall(r"/(?:etc/vmsnap|var/log)/\S+", text))
    assert paths and paths <= {"/etc/vmsnap/backup.toml", "/var/log/vmsnap-backup.log"}, paths


def test_installed_where_they_are_looked_for(tmp_path):
    done = run("cmake", "--install", harness.BUILD, "--prefix", tmp_path)
    assert done.returncode == 0, done.stderr
    share = tmp_path / "share"
    installed = share / "bash-completion/completions/vmsnap"
    assert installed.read_text() == COMPLETION.read_text()
    for path in EXAMPLES.iterdir():
        wanted = path.read_text().replace("/usr/bin/vmsnap", f"{tmp_path}/bin/vmsnap")
        assert (share / "doc/vmsnap/examples" / path.name).read_text() == wanted
    assert os.access(tmp_path / "bin/vmsnap", os.X_OK)
    assert os.access(tmp_path / "libexec/vmsnap-libvirt-monitor", os.X_OK)
    for page in ("man1/vmsnap.1", "man5/vmsnap-backup.5", "man5/vmsnap-image.5"):
        assert (share / "man" / page).is_file(), page
