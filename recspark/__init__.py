"""recspark: raw events in, fresh top-N lists in Delta tables, every night."""

__version__ = "0.1.0"
