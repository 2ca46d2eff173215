"""Tools for testing, most of them on machines without a GPU; nothing here is imported by training code."""
