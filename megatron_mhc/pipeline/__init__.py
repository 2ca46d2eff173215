"""Pipeline parallelism of the streams."""
