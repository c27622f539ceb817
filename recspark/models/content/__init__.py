"""Encoders of content, and models built on their vectors."""
