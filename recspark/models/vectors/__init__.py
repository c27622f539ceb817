"""Models that learn item vectors from the items that occur together."""
