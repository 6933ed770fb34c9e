"""The README shows nothing that does not run: its Python is executed, its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL = ("", "bash", "sh", "shell", "console")
"""Languages of shell blocks; "" is one that names none."""


def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path.read_text()


def blocks(*languages: str) -> list[str]:
    """The fenced code blocks of one of the languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands() -> list[list[str]]:
    """The command lines of the shell blocks, split into words, continuation lines joined, comments left out."""
    lines = "\n".join(blocks(*SHELL)).replace("\\\n", " ").splitlines()
    words = [re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split() for line in lines]
    return [line for line in words if line]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would paste them."""
    python = blocks("python")
    assert python, "README.md has no python block"
    namespace: dict[str, object] = {"__name__": "__readme__"}
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(python, 1):
        exec(compile(text, f"README.md, python block {number}", "exec"), namespace)


def test_make_targets_exist() -> None:
    named = {
        word for line in commands() if line[0] == "make" for word in line[1:] if "=" not in word and word[0] != "-"
    }
    assert named, "README.md has no make command in a shell block"
    named |= set(re.findall(r"`make ([\w-]+)", readme()))
    makefile = ROOT / "Makefile"
    targets = set(re.findall(r"^([\w-]+):", makefile.read_text(), re.MULTILINE)) if makefile.is_file() else set()
    assert named <= targets, f"not in the Makefile: {sorted(named - targets)}"


def test_csdiv_commands_exist() -> None:
    named = {line[1] for line in commands() if line[0] == "csdiv" and len(line) > 1 and not line[1].startswith("-")}
    assert named, "README.md has no csdiv command in a shell block"
    named |= set(re.findall(r"`csdiv (\w+)", readme()))
    for name in sorted(named):
        done = subprocess.run(
            [sys.executable, "-m", "csdiv.cli", name, "--help"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        assert done.returncode == 0, f"csdiv {name}: {done.stderr}"
        flags = {word for line in commands() if line[:2] == ["csdiv", name] for word in line if word.startswith("--")}
        assert not [flag for flag in flags if flag not in done.stdout], f"csdiv {name} has not all of {sorted(flags)}"


def test_files_that_are_named_exist() -> None:
    links = [t for t in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", readme()) if "://" not in t]
    assert links, "README.md has no link to a file"
    links += [word for line in commands() for word in line if re.fullmatch(r"[\w./-]+\.(py|sh)", word)]
    missing = [target for target in links if not (ROOT / target).exists()]
    assert not missing, f"README.md names what is not there: {missing}"


@pytest.mark.skipif(os.name != "posix", reason="the examples are for a POSIX shell")
def test_shell_blocks_parse() -> None:
    shell = blocks(*(language for language in SHELL if language != "console"))
    assert shell, "README.md has no shell block"
    for text in shell:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
