"""Text sources, tokenizer, packed token files and the order of training."""
