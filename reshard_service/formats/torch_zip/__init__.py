"""``torch.save``d state dicts (zip archives) as a source, read by byte ranges."""
