"""The encoder: a Qwen3-shaped decoder, its attention and its pooling."""
