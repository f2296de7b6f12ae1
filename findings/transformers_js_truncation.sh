#!/usr/bin/env bash
# transformers.js cuts a long text after its special tokens were added, and so cuts the last of them.
#
# Guess: `tokenizer(text, {truncation: true, max_length: 6})` gives the ids that the library
# tokenizers gives of the same tokenizer.json: room is left for what the post-processor adds.
#
# Seen (@huggingface/transformers 4.3.2, tokenizers 0.23.1): the first six of all ids. Of a BERT
# tokenizer [SEP] is lost, of one that ends a text with a token that token. No warning is given.
#
# Why it matters: an embedder that takes the state of the last token then takes that of any word.
# Of a model that was trained so, the vectors of long texts had a cosine of 0.53 to the right ones.
#
# What to do: shorten texts before, or set the last id of those that reach `max_length`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.1
# The scripts of its packages fetch libraries for GPUs, which nothing here needs.
npm install --silent --ignore-scripts --prefix "$folder" @huggingface/transformers@4.3.2

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors

folder = pathlib.Path(sys.argv[1], "models/words")
folder.mkdir(parents=True)
words = {word: i for i, word in enumerate("[UNK] [START] [END] a b c d e f g h".split())}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
tokenizer.add_special_tokens(["[UNK]", "[START]", "[END]"])
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
  single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 2)]
)
tokenizer.save(str(folder / "tokenizer.json"))
stated = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
(folder / "tokenizer_config.json").write_text(json.dumps(stated))
tokenizer.enable_truncation(6)
print("tokenizers 0.23.1:", *tokenizer.encode("a b c d e f g h").ids)
PYTHON

cat > "$folder/run.mjs" <<'JS'
import { AutoTokenizer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = `${process.argv[2]}/models`;
const tokenizer = await AutoTokenizer.from_pretrained("words");
const ids = (options) => Array.from(tokenizer("a b c d e f g h", options).input_ids.data, Number);
console.log("transformers.js", env.version + ":", ...ids({ truncation: true, max_length: 6 }));
const [cut, whole] = [ids({ truncation: true, max_length: 6 }), ids({})];
const isPrefix = cut.every((id, i) => id === whole[i]);
process.exit(cut.length === 6 && isPrefix && whole.at(-1) === 2 && cut.at(-1) !== 2 ? 0 : 1);
JS
node "$folder/run.mjs" "$folder"
