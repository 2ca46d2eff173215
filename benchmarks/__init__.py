"""What mHC costs: measured by these modules, `python -m benchmarks.NAME --help`; all of it by all.sh."""
