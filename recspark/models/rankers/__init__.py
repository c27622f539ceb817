"""Models that score given pairs of a user and an item."""
