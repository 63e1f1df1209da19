"""Vocabulary files: Meta's tokenizer.model and Hugging Face's tokenizer.json."""
