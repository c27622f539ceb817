"""Models that give a user and an item a vector each, and multiply them."""
