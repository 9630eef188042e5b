"""`peerkv doctor` in containers that were started wrongly: it says what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.containers.stack import run

ENGINE, GATEWAY = "peerkv-engine:0.1.0-cpu", "peerkv-gateway:0.1.0"
ROOM = ("--shm-size", "2g")
WRONG = {
    "little shared memory": (
        (ENGINE, "--shm-size", "64m"),
        "/dev/shm has 64 MiB free; the block tables and the KV of 2 replicas need 1.1 GiB",
        "for a container --shm-size=4g (SHM_SIZE for compose.yaml",
    ),
    "a volume of root's": (
        (ENGINE, *ROOM, "--volume", "{roots}:/var/log/peerkv", "--env", "PEERKV_LOG_DIR=/var/log/peerkv"),
        "user 10001 may not write to /var/log/peerkv (log_dir)",
        "a container's volume belongs to the user of the image, 10001",
    ),
    "a gateway without the engine's volume": (
        (GATEWAY,),
        "it can run a gateway but no replicas",
        "in a gateway's container, start the engine's with the same volume as run_dir",
    ),
    "no admin key behind a published port": (
        (GATEWAY, "--env", "PEERKV_HOST=0.0.0.0"),
        "/metrics and /kv/* answer nobody who comes through a proxy or a container's published port",
        "set PEERKV_ADMIN_KEY (ADMIN_KEY_FILE for compose.yaml",
    ),
}


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("mistake", WRONG)
def test_the_doctor_says_what_is_wrong_with_a_container_and_what_to_do(mistake: str, tmp_path: Path) -> None:
    (image, *flags), what, remedy = WRONG[mistake]
    tmp_path.chmod(0o755)
    said = run("podman", "run", "--rm", *(flag.format(roots=tmp_path) for flag in flags), image, "doctor", check=False)
    assert what in said.stdout, said.stdout + said.stderr
    assert remedy in said.stdout
