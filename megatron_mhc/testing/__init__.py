"""Tools for testing on machines without a GPU; nothing here is imported by training code."""
