"""Text to tokens and back: bytes, Hugging Face, SentencePiece, trained here."""
