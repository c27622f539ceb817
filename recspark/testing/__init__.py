"""Planted data sets and contract checks, shipped so that models outside recspark can use them."""
