"""Networks of a user tower and item vectors: the score is the product of the two."""
