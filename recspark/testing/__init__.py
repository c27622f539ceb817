"""Data sets with planted answers, and the contract checks that every model must pass.

They are part of the package, so that models outside recspark can use them too.
"""
