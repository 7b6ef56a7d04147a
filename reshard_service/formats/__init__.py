"""One folder a format: a reader into the catalogue and a writer out of it. Nothing here moves tensor bytes."""
