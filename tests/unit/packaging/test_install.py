"""install.sh: quick when nothing changed, an update where that is enough, a new .venv where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TOOLS = (
    "bash",
    "cat",
    "cut",
    "df",
    "dirname",
    "du",
    "flock",
    "grep",
    "awk",
    "mkdir",
    "rm",
    "sha256sum",
    "sync",
    "tail",
    "tr",
    "wc",
    "id",
)

# Stands in for .venv/bin/python: writes down its arguments, and does what the files beside `calls` say.
VENV_PYTHON = """#!/bin/sh
echo "$*" >> {state}/calls
case "$*" in
  "-m pip install"*"torch=="*index-url*|"-m pip install"*index-url*) ;;
  "-m pip install"*"torch=="*) [ ! -e {state}/no-torch ] || {{ echo "ERROR: No matching distribution"; exit 1; }} ;;
  "-m pip install"*) [ ! -e {state}/broken ] || {{ echo "ERROR: the index is gone"; exit 1; }}
    [ ! -e {state}/halting ] || {{ printf '  Looking in ind'
      {real} -c 'import time; time.sleep(1.3)'
      printf 'exes: one\\nthe end'; }}
    printf '#!/bin/sh\\n' > {tree}/.venv/bin/peerkv; chmod +x {tree}/.venv/bin/peerkv ;;
esac
"""
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) echo "$*" >> {state}/calls; mkdir -p "$3/bin"; cp {state}/venv-python "$3/bin/python" ;;
  *ensurepip*) [ ! -e {state}/no-venv ] ;;
  *libnuma*) [ ! -e {state}/no-libnuma ] ;;
  *) exec {real} "$@" ;;
esac
"""


class Tree:
    """A copy of what install.sh needs, with a fake Python and no way out to apt-get or the network."""

    def __init__(self, root: Path) -> None:
        self.path = root / "tree"
        self.state = root / "state"
        tools = root / "bin"
        for directory in (self.path, self.state, tools):
            directory.mkdir()
        for name in ("install.sh", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, self.path)
        for name in (*TOOLS, "cp", "chmod"):
            found = shutil.which(name, path="/usr/bin:/bin")
            assert found, name
            (tools / name).symlink_to(found)
        values = {"state": self.state, "tree": self.path, "real": sys.executable}
        self._program(self.state / "venv-python", VENV_PYTHON.format(**values))
        self._program(tools / "python3", PYTHON.format(**values))
        self.environment = {"PATH": str(tools)}

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def say(self, name: str) -> None:
        (self.state / name).touch()

    def unsay(self, name: str) -> None:
        (self.state / name).unlink()

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.state / "calls").write_text("")
        return subprocess.run(
            ["/bin/bash", str(self.path / "install.sh")],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().splitlines()

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.path / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def made_anew(tree: Tree) -> bool:
    return any(call.startswith("-m venv") for call in tree.calls())


def test_a_cpu_install_takes_the_cpu_torch_and_drops_cuda_builds(tree: Tree) -> None:
    done = tree.install()
    assert (done.returncode, done.stderr) == (0, "")
    pip = [call for call in tree.calls() if call.startswith("-m pip")]
    assert "torch==2.13.0+cpu" in pip[0]
    assert "--index-url" not in pip[0]
    assert "-e .[cpu,dev]" in pip[1]
    assert pip[2] == "-m pip uninstall -y torchvision torchaudio torchcodec"
    assert len(pip) == 3
    assert (tree.path / ".venv" / "constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_a_line_that_comes_in_two_parts_is_logged_whole_and_so_is_one_without_an_end(tree: Tree) -> None:
    tree.say("halting")
    done = tree.install()
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tree.path / ".venv" / "install.log").read_text().splitlines()
    at = lines.index("  Looking in indexes: one")
    assert lines[at + 1] == "the end"
    assert not [line for line in lines if line.strip() in ("Looking in ind", "exes: one")]


def test_a_second_install_does_and_says_nothing(tree: Tree) -> None:
    tree.install()
    done = tree.install()
    assert (done.returncode, done.stdout, done.stderr, tree.calls()) == (0, "", "", [])


def test_torch_comes_from_its_own_index_where_the_configured_one_lacks_it(tree: Tree) -> None:
    tree.say("no-torch")
    done = tree.install()
    assert done.returncode == 0, done.stderr
    assert "--index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu" in "\n".join(tree.calls())


def test_a_gpu_machine_gets_the_gpu_extra_and_keeps_torchvision(tree: Tree) -> None:
    tree._program(Path(tree.environment["PATH"]) / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    tree.replace("install.sh", "GPU_DISK_MIB=20000", "GPU_DISK_MIB=1")
    assert tree.install().returncode == 0
    (pip,) = [call for call in tree.calls() if "pip" in call]
    assert pip.endswith("-e .[gpu,dev]")
    assert tree.install(TARGET="cpu").returncode == 0
    assert made_anew(tree)
    assert "-e .[cpu,dev]" in "\n".join(tree.calls())
    assert tree.install().stdout == "", "what was chosen once is kept"


def test_a_chosen_python_is_kept(tree: Tree) -> None:
    chosen = tree.state / "my-python"
    shutil.copy(Path(tree.environment["PATH"]) / "python3", chosen)
    assert tree.install(PYTHON=str(chosen)).returncode == 0
    assert tree.install().stdout == ""
    chosen.unlink()
    assert tree.install().returncode == 0
    assert made_anew(tree)


def test_changed_dependencies_update_the_environment(tree: Tree) -> None:
    tree.install()
    tree.replace("pyproject.toml", '"aiohttp>=', '"aiohttp >=')
    assert tree.install().returncode == 0
    assert not made_anew(tree)
    assert "-e .[cpu,dev]" in "\n".join(tree.calls())
    assert tree.install().stdout == ""


def test_a_linters_settings_install_nothing(tree: Tree) -> None:
    tree.install()
    tree.replace("pyproject.toml", "[tool.ruff]\n", "[tool.ruff]\nindent-width = 4\n")
    tree.install()
    assert tree.calls() == []


def test_a_moved_tree_gets_a_new_environment(tree: Tree, tmp_path: Path) -> None:
    tree.install()
    tree.path = tree.path.rename(tmp_path / "moved")
    values = {"state": tree.state, "tree": tree.path, "real": sys.executable}
    tree._program(tree.state / "venv-python", VENV_PYTHON.format(**values))
    assert tree.install().returncode == 0
    assert made_anew(tree)


def test_an_interrupted_install_is_redone(tree: Tree) -> None:
    tree.say("broken")
    done = tree.install()
    assert done.returncode == 1
    assert "ERROR: the index is gone" in done.stderr
    assert "installing vLLM failed" in done.stderr
    tree.unsay("broken")
    assert tree.install().returncode == 0
    assert made_anew(tree)


def test_a_missing_venv_module_is_said_with_the_command(tree: Tree) -> None:
    tree.say("no-venv")
    done = tree.install()
    assert done.returncode == 1
    assert f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in done.stderr


def test_a_missing_libnuma_is_said_with_the_command(tree: Tree) -> None:
    tree.say("no-libnuma")
    done = tree.install()
    assert done.returncode == 1
    assert "apt-get install libnuma1" in done.stderr
    assert not (tree.path / ".venv").exists()


def test_a_python_that_is_too_old_is_refused(tree: Tree) -> None:
    old = Path(tree.environment["PATH"]) / "python3"
    tree._program(old, "#!/bin/sh\necho 3.9.2\n")
    done = tree.install()
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr


def test_an_unknown_target_is_refused(tree: Tree) -> None:
    done = tree.install(TARGET="tpu")
    assert done.returncode == 1
    assert "TARGET is cpu or gpu, not 'tpu'" in done.stderr


def test_too_little_disk_space_is_said(tree: Tree) -> None:
    tree.replace("install.sh", "CPU_DISK_MIB=5000", f"CPU_DISK_MIB={1 << 40}")
    done = tree.install()
    assert done.returncode == 1
    assert "MiB of free disk space" in done.stderr


def test_the_repository_is_clean_for_bash() -> None:
    for script in ("install.sh", ".ci/run"):
        assert os.access(REPOSITORY / script, os.X_OK)
        subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)
