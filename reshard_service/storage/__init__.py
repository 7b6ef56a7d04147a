"""Local files and every fsspec store behind one small interface; where a URI may point is decided here."""
