"""Models that count items or relate items to items: popularity, transitions, item-item matrices."""
