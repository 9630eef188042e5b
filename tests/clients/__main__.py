"""`python -m tests.clients --url URL`: stock clients, unchanged and in an environment of their own, against a running gateway.

Without `--url` a gateway is started over fake engines. `--node` adds the openai package of Node.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from tests.clients.programs import PROGRAMS
from tests.fuzz.__main__ import running_gateway

PACKAGES = ("openai", "anthropic", "litellm", "langchain-openai", "langchain-anthropic", "llama-index-llms-openai-like")
NODE = """
import OpenAI from "openai";
const [url, key, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const chat = await client.chat.completions.create({ model, messages, max_tokens: 4 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 4, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify({ chat: chat.choices[0].message.content, streamed }));
"""
PROGRAM_SECONDS = 300


def main() -> int:
    """0 if every client got all that it asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--url", help="a running gateway (default: one is started over fake engines)")
    parser.add_argument("--key", default="unused-key", help="an API key, where there are any")
    parser.add_argument("--venv", type=Path, help="where the clients are installed, and stay (default: a directory that goes)")
    parser.add_argument("--only", nargs="+", choices=[*PROGRAMS, "node"], help="clients to run (default: all but node)")
    parser.add_argument("--node", action="store_true", help="also the openai package of Node, with npm")
    given = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-clients-")))
        python = installed(given.venv or directory / "venv")
        url = given.url or stack.enter_context(running_gateway(directory))
        model = served(url, given.key)
        failed = [name for name in given.only or PROGRAMS if name != "node" and not works(name, python, url, given.key, model)]
        if (given.node or "node" in (given.only or ())) and not node_works(directory, url, given.key, model):
            failed.append("node")
    print(f"failed: {', '.join(failed)}" if failed else "every client got all that it asked for")
    return len(failed)


def installed(venv: Path) -> Path:
    """The interpreter of an environment with the clients' newest releases."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def served(url: str, key: str) -> str:
    """The first model's name."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=PROGRAM_SECONDS) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


def works(name: str, python: Path, url: str, key: str, model: str) -> bool:
    """Whether the client got something for everything."""
    program = Path(__file__).with_name("programs.py")
    return shown(name, [str(python), str(program), name, url, key, model], program.parent)


def node_works(directory: Path, url: str, key: str, model: str) -> bool:
    """As `works`, of the openai package of Node, installed by npm."""
    (directory / "client.mjs").write_text(NODE)
    subprocess.run(["npm", "install", "--silent", "openai"], cwd=directory, check=True)
    return shown("node", ["node", "client.mjs", url, key, model], directory)


def shown(name: str, command: list[str], directory: Path) -> bool:
    """Run a client and print what it got; whether nothing of that is empty."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    if done.returncode:
        print(f"{name}: FAILED\n{done.stderr[-2000:]}")
        return False
    got = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {got}")
    return all(got.values())


if __name__ == "__main__":
    sys.exit(main())
