"""Data, in rooms: images, text, scenes, reading, examples, preparing; each says what of the others it may import.

Beside the rooms: `options` (`config.data`), `randomness`, and commands: `prepare`, `tokenizer`, `tsv`, `frequencies`.
"""
