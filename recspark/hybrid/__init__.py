"""Combining the lists of several models."""
