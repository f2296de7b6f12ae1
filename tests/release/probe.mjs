// Compares a folder with its parity.json in transformers.js: node probe.mjs FOLDER
//
// Prints one JSON object, as probe.py.

import fs from "node:fs";
import path from "node:path";
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";

const folder = path.resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const read = (name) => JSON.parse(fs.readFileSync(path.join(folder, name), "utf8"));
const prompts = read("config_sentence_transformers.json").prompts;
const longest = read("sentence_bert_config.json").max_seq_length;
const tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
const model = await AutoModel.from_pretrained(path.basename(folder), { dtype: "fp32" });

const other = [];
let least = 1;
// It cuts the token that ends a text with the rest: docs/compatibility.md.
const found = read("parity.json").items.filter((item) => item.input_ids.length < longest && !item.max_length);
for (const item of found) {
  const bytes = Buffer.from(item.embedding, "base64");
  const expected = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const text = (prompts[item.prompt_name] ?? "") + item.text;
  const inputs = tokenizer(text, { truncation: true, max_length: item.max_length ?? longest });
  const ids = Array.from(inputs.input_ids.data, Number);
  if (JSON.stringify(ids) !== JSON.stringify(item.input_ids)) other.push(item.id);
  const { sentence_embedding } = await model(inputs);
  const vector = sentence_embedding.data;
  least = Math.min(least, expected.reduce((sum, x, i) => sum + x * vector[i], 0));
}
console.log(JSON.stringify({ other_ids: other, cosine: least, texts: found.length }));
