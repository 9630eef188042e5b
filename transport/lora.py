"""What a LoRA adapter is called in block keys: its name, its path, and which files lay there when it was first seen."""

import os

import xxhash


def adapter_identity(name: str, path: str) -> str:
    """Return a text that changes with the adapter's name, path, and the names, sizes and times of change of its files.

    An adapter that is not a local directory is told by name and path alone.
    """
    digest = xxhash.xxh3_64()
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                found = entry.stat()
                digest.update(f"{entry.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    except OSError:
        return f"{name}={path}"
    return f"{name}={path}={digest.hexdigest()}"
