"""Models of items and their neighbours: counts, cosines, and a matrix in closed form."""
