"""Torch modules and nothing else; every tensor line carries its shape."""
