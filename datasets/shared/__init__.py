"""What the readers share: archives, annotations, decoding, writing, duplicates, the drawn faces."""
