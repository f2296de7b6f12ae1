"""Lists the commands, or runs one: python -m mlembed_jax train --config quickstart --workdir DIR.

The program `mlembed`, which the installation makes, does the same.
"""

import runpy
import sys

from mlembed_jax import __version__

COMMANDS = {
  "prepare": "checks and tokenises text once, for training",
  "vocabulary": "writes a tokenizer with the tokens that some texts need",
  "teach": "writes the vectors that a teacher gives prepared texts",
  "train": "trains an encoder",
  "export": "writes folders in Hugging Face layout, smaller ones, ONNX and GGUF",
  "encode": "writes the vectors of a file of texts",
  "search": "finds the nearest texts of a file to queries, by its vectors",
  "evaluate": "scores a model, or every slice of it",
  "doctor": "says what each program makes of a folder, or checks a workdir",
  "aot": "compiles a step for TPUs without any, and says what it needs",
}


def main() -> None:
  """Runs the command that the first argument names, with the others."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print("usage: mlembed COMMAND --FLAG=VALUE ...; each command takes --help\n")
    print("\n".join(f"  {command:<10} {said}" for command, said in COMMANDS.items()))
    return
  if name == "--version":
    print(f"mlembed_jax {__version__}")
    return
  if name not in COMMANDS:
    sys.exit(f"error: {name!r} is no command; there are {', '.join(COMMANDS)}")
  del sys.argv[1]
  runpy.run_module(f"mlembed_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
