"""Tensors in files: read with every check that needs no model, and written whole or not at all."""
