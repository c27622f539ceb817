"""How good lists are: metrics, one-pass evaluation, bootstrap intervals, publish gates."""
