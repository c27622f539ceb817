"""Torch modules and nothing else; every line with a tensor has its shape in a comment."""
