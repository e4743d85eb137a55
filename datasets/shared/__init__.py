"""Code that the data sets share: archives, annotations, decoding, writing, duplicates, the drawn faces."""
