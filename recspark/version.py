"""The version of recspark, which artifacts name and `setup.py` reads."""

__version__ = "0.1.0"
