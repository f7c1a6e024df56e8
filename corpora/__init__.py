"""What a text corpus is and can do: bytes, text, tokens, blocks.  Plain Python, no Prefect, no torch."""
