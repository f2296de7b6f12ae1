"""Names of the small files of a folder in Hugging Face layout; spelt nowhere else."""

CONFIG = "config.json"  # of the model, and of each module in its own folder
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of sentence-transformers.
MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
BERT = "sentence_bert_config.json"  # of the module Transformer, whatever the model is
CARD = "README.md"
# Of weights in forms that are not read.
ADAPTER = "adapter_config.json"
