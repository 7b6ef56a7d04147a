"""What happens between source and target tensors: names, dtype rules, casts."""
