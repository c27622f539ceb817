"""The stages of a night: one file for each stage."""
