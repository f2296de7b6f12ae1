"""Stands in for llama-server, which no wheel of PyPI holds: the same server, by xllamacpp.

    python llama_server.py --embedding --model FILE

Serves until it is stopped, at the port of llama-server.
"""

import argparse
import threading

import xllamacpp


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--embedding", action="store_true")
  parser.add_argument("--model", required=True)
  args = parser.parse_args()
  params = xllamacpp.CommonParams()
  params.model.path, params.embedding, params.port = args.model, args.embedding, 8080
  server = xllamacpp.Server(params)
  print(server.listening_address, flush=True)
  threading.Event().wait()


if __name__ == "__main__":
  main()
