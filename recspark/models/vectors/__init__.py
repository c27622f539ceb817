"""Models that learn vectors of items from what stands beside them."""
