"""How good lists are: metrics, evaluation in one pass, bootstrap intervals and publish gates."""
